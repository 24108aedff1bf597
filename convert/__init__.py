"""Published checkpoints of DETR, and our own: from the names and forms of their entries to our arrays."""

from detr_jax.convert.checkpoint import Checkpoint, write_checkpoint
from detr_jax.convert.facts import Facts
from detr_jax.convert.opening import open_checkpoint
from detr_jax.convert.published import published_checkpoint

__all__ = ["Checkpoint", "Facts", "open_checkpoint", "published_checkpoint", "write_checkpoint"]
