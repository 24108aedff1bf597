"""Thresholds of scores from what they are on held-out training images: to a density, or to a recall.

The scores of every FFN are counted in a histogram whose bins are floating-point numbers cut to 9 bits of mantissa, so
it needs no range, adds up over batches, and its quantiles are exact to 0.2 %.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.errors import InputError
from detr_jax.kernels import repeat_per_tile
from detr_jax.methods.base import Score, ordered_bits
from detr_jax.methods.grouping import active_groups
from detr_jax.methods.tiles import existing_tiles, existing_tokens
from detr_jax.models import FFNTrace, FFNWeights

_DROPPED_BITS = 14
_BINS = 2 ** (32 - _DROPPED_BITS)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScoreHistogram:
    """Scores of one FFN; of a batch as int32, of many as int64.

    Attributes:
        all: (bins,) scores of all tokens (or tiles of them) and groups, neurons or channels.
        firing: (bins,) of them, those of groups or neurons that fire; zeros for channels.
    """

    all: jax.Array
    firing: jax.Array

    def __add__(self, other: "ScoreHistogram") -> "ScoreHistogram":
        """The sum of two, in 64 bits."""
        return jax.tree.map(lambda a, b: np.asarray(a, np.int64) + np.asarray(b), self, other)


def score_histogram(score: Score, weights: FFNWeights, trace: FFNTrace, tile_size: int = 1) -> ScoreHistogram:
    """The scores of one batch; jittable.

    Args:
        score: of the FFN.
        weights: of the FFN.
        trace: what went through it.
        tile_size: consecutive tokens that are computed together: the highest of their scores counts, once, because a
            tile computes whatever one of its tokens needs.
    """
    tokens = trace.tokens
    scores = repeat_per_tile(score(weights, trace.inputs, tokens), tokens.shape[-1], score.traits.tile_size)
    if score.traits.granularity == "channel":
        fires = jnp.zeros(scores.shape, bool)
    else:
        fires = active_groups(trace.hidden, scores.shape[-1])
    highest = existing_tokens(scores, tokens, tile_size, -jnp.inf).max(2)
    fires = existing_tokens(fires, tokens, tile_size, False).any(2)
    counted = jnp.broadcast_to(existing_tiles(tokens, tile_size)[..., None], highest.shape)
    bins = _bin(highest).ravel()
    empty = jnp.zeros(_BINS, jnp.int32)
    return ScoreHistogram(*(empty.at[bins].add(which.ravel().astype(jnp.int32)) for which in (counted, fires)))


def _bin(scores: jax.Array) -> jax.Array:
    """The bin of each float32; bins are ordered like the numbers."""
    return (ordered_bits(scores) >> _DROPPED_BITS).astype(jnp.int32)


def _edge(bin: int) -> float:
    """The least float32 in a bin."""
    ordered = np.uint32(int(bin) << _DROPPED_BITS)
    sign = np.uint32(1 << 31)
    return float((ordered ^ sign if ordered >= sign else ~ordered).view(np.float32))


def density_threshold(histogram: ScoreHistogram, density: float) -> float:
    """The lowest threshold at which at most a share of the groups, neurons or channels is kept.

    Args:
        histogram: of the FFN's scores.
        density: from 0 to 1; 1 gives minus infinity.

    Raises:
        ValueError: if the density is no share, or nothing was counted.
    """
    bins, kept = _kept(histogram.all, density, "density")
    if density == 1:
        return -np.inf
    few = bins[kept <= density * kept[0]]
    return _edge(few[0]) if len(few) else np.inf


def recall_threshold(histogram: ScoreHistogram, recall: float) -> float:
    """The highest threshold at which at least a share of the firing groups is kept.

    Args:
        histogram: of the FFN's scores.
        recall: from 0 to 1.

    Raises:
        ValueError: if the recall is no share, or nothing was counted.
    """
    _kept(histogram.all, recall, "recall")
    if not histogram.firing.any():
        return np.inf
    bins, found = _kept(histogram.firing, recall, "recall")
    return _edge(bins[found >= recall * found[0]][-1])


def _kept(counts: np.ndarray, share: float, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The bins that are not empty, and how many scores are in each of them or above."""
    if not 0 <= share <= 1:
        raise InputError(f"a {name} must be between 0 and 1, not {share}")
    counts = np.asarray(counts, np.int64)
    if not counts.any():
        raise InputError("there are no images to calibrate thresholds on")
    bins = np.flatnonzero(counts)
    return bins, np.cumsum(counts[bins][::-1])[::-1]
