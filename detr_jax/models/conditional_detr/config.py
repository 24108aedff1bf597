"""Configuration of a Conditional DETR."""

from dataclasses import dataclass

from detr_jax.models.detr.config import DetrConfig


@dataclass(frozen=True)
class ConditionalDetrConfig(DetrConfig):
    """As of a DETR, whose encoder it has; there are `len(labels)` logits, none of them of "no object"."""

    queries: int = 300

    @property
    def logits(self) -> int:
        return self.classes
