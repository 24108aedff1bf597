"""Deformable attention: every query samples the image tokens at a few points (Zhu et al. 2021, section 4.1)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from detr_jax.kernels.sampling import Shapes, multi_scale_sampling
from detr_jax.models.deformable_detr.config import DeformableDetrConfig


def _rays(heads: int, levels: int, points: int) -> np.ndarray:
    """First offsets, as in the official code: a direction for each head, and one cell farther for each point."""
    angles = np.arange(heads) * 2 * np.pi / heads
    rays = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    rays /= np.abs(rays).max(-1, keepdims=True)
    steps = np.arange(1, points + 1)[:, None]
    return np.broadcast_to(rays[:, None, None] * steps, (heads, levels, points, 2)).reshape(-1).astype(np.float32)


class DeformableAttention(nnx.Module):
    """Sums of values at points around a reference, both predicted from the query."""

    def __init__(self, config: DeformableDetrConfig, heads: int, points: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        zeros, xavier = nnx.initializers.zeros_init(), nnx.initializers.glorot_uniform()
        self.shape = (heads, config.levels, points)
        self.sample = multi_scale_sampling
        samples, d_model = heads * config.levels * points, config.d_model
        # Locations and their weights in float32: a fraction of a cell needs its digits.
        self.offsets = nnx.Linear(d_model, 2 * samples, kernel_init=zeros, rngs=rngs)
        self.offsets.bias = nnx.Param(jnp.asarray(_rays(*self.shape)))
        self.weights = nnx.Linear(d_model, samples, kernel_init=zeros, rngs=rngs)
        self.value = nnx.Linear(d_model, d_model, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(d_model, d_model, kernel_init=xavier, dtype=dtype, rngs=rngs)

    def __call__(
        self, queries: jax.Array, references: jax.Array, memory: jax.Array, tokens: jax.Array, shapes: Shapes
    ) -> jax.Array:
        """Outputs (batch, queries, d).

        Args:
            queries: (batch, queries, d), with their positions.
            references: (batch, queries, levels, 2 or 4) float32, (x, y) or boxes (cx, cy, w, h) as fractions of the
                padded image.
            memory: (batch, tokens, d).
            tokens: (batch, tokens) bool, false for padding, whose values are zero.
            shapes: rows and columns of each level of the memory.
        """
        (batch, count, _), (heads, levels, points) = queries.shape, self.shape
        exact = queries.astype(jnp.float32)
        offsets = self.offsets(exact).reshape(batch, count, heads, levels, points, 2)
        weights = jax.nn.softmax(self.weights(exact).reshape(batch, count, heads, levels * points))
        if references.shape[-1] == 2:
            offsets /= jnp.asarray([(width, height) for height, width in shapes], jnp.float32)[:, None]
        else:
            offsets *= references[:, :, None, :, None, 2:] * (0.5 / points)
        locations = references[:, :, None, :, None, :2] + offsets
        value = jnp.where(tokens[..., None], self.value(memory), 0)
        value = value.reshape(batch, value.shape[1], heads, -1)
        weights = weights.reshape(batch, count, heads, levels, points)
        return self.out(self.sample(value, shapes, locations, weights))
