"""Which neurons a tile of tokens needs, those that make up nearly all of what its FFN adds to the output; and
permutations by that.

What a neuron contributes to a tile is the sum over its tokens of h_j ||W_out[j]||, an upper bound of its share of the
output; firing alone says nothing about it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.calibration.accumulate import accumulate
from detr_jax.data.batches import CachedBatches
from detr_jax.errors import InputError
from detr_jax.methods.grouping import group_count
from detr_jax.methods.tiles import tiles_of
from detr_jax.models import FFNTrace, FFNWeights, HasFFNs
from detr_jax.pytrees import Sums


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
class TopPStatistics(Sums):
    """Sums over the tiles of an FFN; of one batch as int32 and float32, of many as 64 bits.

    Attributes:
        tiles: () number of tiles with a token.
        coneeded: (F, F) tiles that need both neurons; on the diagonal those that need one.
        contributed: (F,) sum of the shares that the neuron has in what is contributed to each tile.
    """

    tiles: jax.Array
    coneeded: jax.Array
    contributed: jax.Array


def measure_top_p(
    model: HasFFNs, batches: Sequence[Any], tile_size: int | None, share: float
) -> dict[str, TopPStatistics]:
    """What the tiles of every FFN need while it runs dense.

    Args:
        model: the FFNs.
        batches: its inputs.
        tile_size: consecutive tokens per tile; None for whole images.
        share: of what is contributed to a tile that the needed neurons make up.

    Returns:
        statistics by name of the FFN.

    Raises:
        ValueError: if a tile would have no token, or there are no images.
    """
    measure = partial(_measure, tile_size=tile_size, share=share)
    return accumulate(measure, model, CachedBatches(batches), "measure what tiles need")


@partial(jax.jit, static_argnames=("tile_size", "share"))
def _measure(model, batch, *, tile_size, share):
    weights = model.ffn_weights()

    def statistics(weights: FFNWeights, trace: FFNTrace) -> TopPStatistics:
        size = trace.hidden.shape[1] if tile_size is None else tile_size
        exists = tiles_of(trace.tokens[..., None], size).any((2, 3))
        tiles = tiles_of(contributions(weights, trace), size).sum(2).reshape(-1, trace.hidden.shape[-1])
        ones = needed(tiles, share).astype(jnp.float32)  # counts below 2^24 are exact
        shares = tiles / jnp.maximum(tiles.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        return TopPStatistics(exists.sum(), (ones.T @ ones).astype(jnp.int32), shares.sum(0))

    return {name: statistics(weights[name], trace) for name, trace in model.traces(batch, {}).items()}


@dataclass(frozen=True)
class TopPPermutation:
    """An order in three sections, each of whole blocks.

    Attributes:
        order: (F,).
        always: number of neurons in front that nearly every tile needs.
        gated: number of those that follow, which some tiles need.
        never: number of those at the end, which contribute next to nothing.
    """

    order: np.ndarray
    always: int
    gated: int
    never: int


def top_p_permutation(
    statistics: TopPStatistics, block_size: int, *, always: float = 0.95, negligible: float = 1e-3
) -> TopPPermutation:
    """Blocks of neurons that the same tiles need, between blocks for every tile and blocks for none.

    Greedy: of the gated neurons, the one that contributes most founds a block; then join, one by one, those that add
    least to the tiles that need the block (Jaccard index). How many tiles need it is known of pairs alone, so that a
    neuron adds, at most, the tiles that need it without the member with which it shares most. Where neurons tie, the
    one that contributes more comes first.

    Args:
        statistics: of the FFN.
        block_size: neurons per block.
        always: share of the tiles that need a neuron from which on it is not gated.
        negligible: share of all that is contributed which the neurons that are never computed may make up.

    Raises:
        ValueError: if the neurons cannot be divided into blocks of that size, or a share is not from 0 to 1.
    """
    for name, share in (("always", always), ("negligible", negligible)):
        if not 0 <= share <= 1:
            raise InputError(f"{name} must be a share from 0 to 1, not {share}")
    blocks = group_count(len(statistics.contributed), block_size)
    ranked = np.argsort(-statistics.contributed, kind="stable")
    upwards = np.cumsum(statistics.contributed[ranked[::-1]])
    never = (upwards <= negligible * upwards[-1]).sum() // block_size * block_size
    kept, dropped = np.split(ranked, [blocks * block_size - never])

    frequent = kept[np.diag(statistics.coneeded)[kept] >= always * statistics.tiles]
    constant = frequent[: len(frequent) // block_size * block_size]
    gated = kept[~np.isin(kept, constant)]
    clustered = gated[_greedy_unions(statistics.coneeded[np.ix_(gated, gated)], block_size)]
    order = np.concatenate([constant, clustered, dropped])
    return TopPPermutation(order, len(constant), len(gated), len(dropped))


def _greedy_unions(coneeded: np.ndarray, block_size: int) -> np.ndarray:
    """An order of neurons that are given with the most important one first."""
    needing = np.diag(coneeded)
    free = np.ones(len(needing), bool)
    order: list[int] = []
    while free.any():
        founder = int(free.argmax())
        union, shared = needing[founder], coneeded[founder]
        order.append(founder)
        free[founder] = False
        for _ in range(block_size - 1):
            closeness = shared / np.maximum(union + needing - shared, 1)
            joins = int(np.where(free, closeness, -1).argmax())
            union = union + needing[joins] - shared[joins]
            shared = np.maximum(shared, coneeded[joins])
            order.append(joins)
            free[joins] = False
    return np.array(order, int)
