"""Contributions of groups to many tokens at once, by regression on pooled inputs; hardly any work per token."""

from dataclasses import field
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.methods.base import Traits, group_sums, storable
from detr_jax.methods.grouping import group_count
from detr_jax.methods.tiles import existing_tiles, existing_tokens, mean_of_tokens
from detr_jax.models import FFNWeights

if TYPE_CHECKING:
    from detr_jax.calibration.moments import CrossMoments

RIDGE = 0.3
"""Of features with variance 1."""


@storable
class PooledStatistics:
    """About the mean over tokens of h_j ||W_out[j]||, summed over a group, from the mean, deviation and maximum of x.

    Ours; after the pooled gates of Gao et al. 2024, "SeerAttention", without a layer that runs for each token.
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


def fit_pooled_statistics(moments: "CrossMoments", group_size: int, window: int | None) -> PooledStatistics:
    """The regression, by ridge in closed form, from what `calibration.moments.measure_pooled` returns for a window.

    Raises an InputError if the group size does not divide the neurons.
    """
    groups = group_count(len(moments.output_sums), group_size)
    mean, covariance = moments.inputs.mean, moments.inputs.covariance
    deviations = np.sqrt(np.maximum(np.diag(covariance), 0))
    scale = np.where(deviations > 1e-6, 1 / np.maximum(deviations, 1e-6), 0)  # constant features get no weight
    correlation = covariance * np.outer(scale, scale)
    targets = group_sums(moments.output_mean, groups)
    standardised = group_sums(moments.cross_covariance, groups) * scale[:, None]
    up = np.linalg.solve(correlation + RIDGE * np.eye(len(correlation)), standardised) * scale[:, None]
    return PooledStatistics(jnp.asarray(up, jnp.float32), jnp.asarray(targets - mean @ up, jnp.float32), window)
