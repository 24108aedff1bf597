"""A score of earlier plan files: contributions of groups to many tokens at once, by regression on pooled inputs."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.methods.base import Traits, storable
from detr_jax.methods.tiles import existing_tiles, existing_tokens, mean_of_tokens
from detr_jax.models import FFNWeights


@storable
@dataclass(frozen=True)
class PooledStatistics:
    """About the mean over tokens of h_j ||W_out[j]||, summed over a group, from the mean, deviation and maximum of x.

    Plans of version 3 may hold it. It gained nothing (docs/negative-results.md) and is not fitted any more.
    """

    up: jax.Array
    """(3 d, G) float32."""
    bias: jax.Array
    """(G,) float32."""
    window: int | None = field(default=None, metadata={"static": True})
    """Consecutive tokens of a decision; None for all of an image."""

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        return pooled_statistics(x, tokens, self.window) @ self.up + self.bias

    @property
    def traits(self) -> Traits:
        return Traits("statistics", "image", "both", tile_size=self.window)

    def cost(self, d_model: int, features: int) -> float:
        # Pooling multiplies once per channel. Tokens of a whole image, of unknown number here, share the rest.
        return d_model + (self.up.size / self.window if self.window else 0.0)

    def of_groups(self, groups: np.ndarray) -> "PooledStatistics":
        """See `SharedScore`."""
        return PooledStatistics(self.up[:, groups], self.bias[groups], self.window)


def pooled_statistics(x: jax.Array, tokens: jax.Array, window: int | None) -> jax.Array:
    """(images, tokens, d) -> (images, windows, 3 d) float32, the mean, standard deviation and maximum of each channel.

    `tokens` (images, tokens) bool is false for padding; windows of padding alone are 0.
    """
    x = x.astype(jnp.float32)
    size = window or tokens.shape[-1]
    mean = mean_of_tokens(x, tokens, window)
    squares = mean_of_tokens(x**2, tokens, window)
    largest = existing_tokens(x, tokens, size, -jnp.inf).max(-2)
    largest = jnp.where(existing_tiles(tokens, size)[..., None], largest, 0)
    return jnp.concatenate([mean, jnp.sqrt(jnp.maximum(squares - mean**2, 0)), largest], axis=-1)
