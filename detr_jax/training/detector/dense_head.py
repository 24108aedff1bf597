"""A head that helps to train a small detector and is thrown away with the training's end."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from detr_jax.models import DetrConfig
from detr_jax.models.detr.modeling import BoxHead

TYPICAL_SIZE = 0.3
"""Width and height, in fractions of the image, that boxes start from."""


def token_centres(grids: Sequence[tuple[int, int]]) -> jax.Array:
    """(tokens, 2) centres (x, y) of grids' tokens in fractions of the image; a grid has (rows, columns)."""
    centres = []
    for rows, columns in grids:
        y, x = jnp.meshgrid((jnp.arange(rows) + 0.5) / rows, (jnp.arange(columns) + 0.5) / columns, indexing="ij")
        centres.append(jnp.stack([x, y], axis=-1).reshape(-1, 2))
    return jnp.concatenate(centres)


class DenseHead(nnx.Module):
    """Class and box of the object over each encoder token, the box relative to the token's place.

    DETR adds positions to queries and keys only, so a token's features do not say where it is; what they can say is
    what is around it.
    """

    def __init__(self, config: DetrConfig, *, rngs: nnx.Rngs):
        self.class_head = nnx.Linear(config.d_model, config.logits, rngs=rngs)
        self.box_head = BoxHead(config.d_model, rngs=rngs)

    def __call__(self, memory: jax.Array, centres: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(batch, tokens, d) with (tokens, 2) centres -> (batch, tokens, logits), (batch, tokens, 4) boxes."""
        anchors = jnp.concatenate([centres, jnp.full_like(centres, TYPICAL_SIZE)], axis=-1)
        boxes = jax.nn.sigmoid(self.box_head.log_odds(memory) + jax.scipy.special.logit(anchors))
        return self.class_head(memory), boxes
