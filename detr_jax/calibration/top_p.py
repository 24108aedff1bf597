"""Which neurons a tile of tokens needs: those that make up nearly all of what its FFN adds to the output.

What a neuron contributes to a tile is the sum over its tokens of h_j ||W_out[j]||, an upper bound of its share of the
output; firing alone says nothing about it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.calibration.accumulate import sum_by_name
from detr_jax.methods.tiles import tiles_of
from detr_jax.models import FFNTrace, FFNWeights
from detr_jax.models.base import HasFFNs


def contributions(weights: FFNWeights, trace: FFNTrace) -> jax.Array:
    """(images, tokens, F) float32, h_j ||W_out[j]|| of every token; 0 in padding. Jittable."""
    norms = jnp.linalg.norm(weights.w_out.astype(jnp.float32), axis=1)
    return jnp.where(trace.tokens[..., None], trace.hidden.astype(jnp.float32) * norms, 0)


def needed(contributed: jax.Array, share: float) -> jax.Array:
    """The fewest entries that make up a share of the sum of each row, with all that tie with the last; jittable.

    Args:
        contributed: (..., n), not negative; what contributes nothing is never needed.
        share: from 0 to 1.

    Returns:
        (..., n) bool.
    """
    descending = -jnp.sort(-contributed, axis=-1)
    before = jnp.cumsum(descending, -1) - descending
    count = (before < share * descending.sum(-1, keepdims=True)).sum(-1, keepdims=True)
    least = jnp.take_along_axis(descending, jnp.maximum(count - 1, 0), -1)
    return (contributed >= least) & (contributed > 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TopPStatistics:
    """Sums over the tiles of an FFN; of one batch as int32 and float32, of many as 64 bits.

    Attributes:
        tiles: () number of tiles with a token.
        coneeded: (F, F) tiles that need both neurons; on the diagonal those that need one.
        contributed: (F,) sum of the shares that the neuron has in what is contributed to each tile.
    """

    tiles: jax.Array
    coneeded: jax.Array
    contributed: jax.Array

    def __add__(self, other: "TopPStatistics") -> "TopPStatistics":
        """The sum of two in 64 bits."""
        return TopPStatistics(
            np.asarray(self.tiles, np.int64) + other.tiles,
            np.asarray(self.coneeded, np.int64) + other.coneeded,
            np.asarray(self.contributed, np.float64) + other.contributed,
        )


def measure_top_p(
    ffns_of: HasFFNs, batches: Iterable[Any], tile_size: int | None, share: float
) -> dict[str, TopPStatistics]:
    """What the tiles of every FFN need while it runs dense.

    Args:
        carrier: of the FFNs.
        batches: its inputs.
        tile_size: consecutive tokens per tile; None for whole images.
        share: of what is contributed to a tile that the needed neurons make up.

    Returns:
        statistics by name of the FFN.

    Raises:
        ValueError: if a tile would have no token, or there are no images.
    """
    counted = (jax.device_get(_measure(ffns_of, batch, tile_size=tile_size, share=share)) for batch in batches)
    return sum_by_name(counted, "measure what tiles need")


@partial(jax.jit, static_argnames=("tile_size", "share"))
def _measure(ffns_of, batch, *, tile_size, share):
    weights = ffns_of.ffn_weights()

    def statistics(weights: FFNWeights, trace: FFNTrace) -> TopPStatistics:
        size = trace.hidden.shape[1] if tile_size is None else tile_size
        exists = tiles_of(trace.tokens[..., None], size).any((2, 3))
        tiles = tiles_of(contributions(weights, trace), size).sum(2).reshape(-1, trace.hidden.shape[-1])
        ones = needed(tiles, share).astype(jnp.float32)  # counts below 2^24 are exact
        shares = tiles / jnp.maximum(tiles.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        return TopPStatistics(exists.sum(), (ones.T @ ones).astype(jnp.int32), shares.sum(0))

    return {name: statistics(weights[name], trace) for name, trace in ffns_of.traces(batch, {}).items()}
