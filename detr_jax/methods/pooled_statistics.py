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

    Attributes:
        up: (3 d, G) float32.
        bias: (G,) float32.
        window: consecutive tokens of a decision; None for all of an image.
    """

    up: jax.Array
    bias: jax.Array
    window: int | None = field(default=None, metadata={"static": True})

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        return pooled_statistics(x, tokens, self.window) @ self.up + self.bias

    @property
    def traits(self) -> Traits:
        return Traits("statistics", "image", "both", tile_size=self.window)

    def cost(self, d_model: int, features: int) -> float:
        # Pooling multiplies once per channel; the regression is shared by the tokens of an image, whose number is not
        # known here, and not counted there.
        return d_model + (self.up.size / self.window if self.window else 0.0)

    def of_groups(self, groups: np.ndarray) -> "PooledStatistics":
        """See `SharedScore`."""
        return PooledStatistics(self.up[:, groups], self.bias[groups], self.window)


def pooled_statistics(x: jax.Array, tokens: jax.Array, window: int | None) -> jax.Array:
    """The mean, standard deviation and maximum of each channel; 0 for windows of padding alone.

    Args:
        x: (images, tokens, d).
        tokens: (images, tokens) bool, false for padding.
        window: consecutive tokens that are pooled; None for all of an image.

    Returns:
        (images, windows, 3 d) float32.
    """
    x = x.astype(jnp.float32)
    size = window or tokens.shape[-1]
    mean = mean_of_tokens(x, tokens, window)
    squares = mean_of_tokens(x**2, tokens, window)
    largest = existing_tokens(x, tokens, size, -jnp.inf).max(-2)
    largest = jnp.where(existing_tiles(tokens, size)[..., None], largest, 0)
    return jnp.concatenate([mean, jnp.sqrt(jnp.maximum(squares - mean**2, 0)), largest], axis=-1)
