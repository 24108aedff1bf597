"""Thresholds of scores from their histograms on held-out images: to a density, or to a recall.

The bins of a histogram are floating-point numbers cut to 9 bits of mantissa, so it needs no range, adds up over
batches, and its quantiles are exact to 0.2 %.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.calibration.accumulate import accumulate
from detr_jax.data.batches import BatchSource
from detr_jax.errors import InputError
from detr_jax.kernels import repeat_per_tile
from detr_jax.methods.base import FitMaterial, Method, Score, Thresholded, ordered_bits
from detr_jax.methods.grouping import active_groups
from detr_jax.methods.tiles import existing_tiles, existing_tokens
from detr_jax.models import FFNTrace, FFNWeights, HasFFNs, Selector, Selectors
from detr_jax.pytrees import Array, Sums, pytree

_DROPPED_BITS = 14
_BINS = 2 ** (32 - _DROPPED_BITS)


@pytree
class ScoreHistogram(Sums):
    """Scores of one FFN; of a batch as int32, of many as int64."""

    all: Array
    """(bins,) scores of all tokens (or tiles of them) and groups, neurons or channels."""
    firing: Array
    """(bins,) of them, those of groups or neurons that fire; zeros for channels."""


def score_histogram(score: Score, weights: FFNWeights, trace: FFNTrace, tile_size: int = 1) -> ScoreHistogram:
    """The scores of one batch; jittable.

    Of `tile_size` consecutive tokens that are computed together the highest score counts, once, because a tile computes
    whatever one of its tokens needs.
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
    bins = (ordered_bits(highest) >> _DROPPED_BITS).astype(jnp.int32).ravel()  # ordered like the scores
    empty = jnp.zeros(_BINS, jnp.int32)
    return ScoreHistogram(*(empty.at[bins].add(which.ravel().astype(jnp.int32)) for which in (counted, fires)))


def _edge(bin: int) -> float:
    """The least float32 in a bin."""
    ordered = np.uint32(int(bin) << _DROPPED_BITS)
    sign = np.uint32(1 << 31)
    return float((ordered ^ sign if ordered >= sign else ~ordered).view(np.float32))


def density_threshold(histogram: ScoreHistogram, density: float) -> float:
    """The lowest threshold at which at most a share of the groups, neurons or channels is kept; -inf for all of them.

    Raises:
        InputError: if the density is no share from 0 to 1, or nothing was counted.
    """
    bins, kept = _kept(histogram.all, density, "density")
    if density == 1:
        return -np.inf
    few = bins[kept <= density * kept[0]]
    return _edge(few[0]) if len(few) else np.inf


def recall_threshold(histogram: ScoreHistogram, recall: float) -> float:
    """The highest threshold at which at least a share of the firing groups is kept; inf where none fires.

    Raises:
        InputError: if the recall is no share from 0 to 1, or nothing was counted.
    """
    _kept(histogram.all, recall, "recall")
    if not histogram.firing.any():
        return np.inf
    bins, found = _kept(histogram.firing, recall, "recall")
    return _edge(bins[found >= recall * found[0]][-1])


def _kept(counts: Array, share: float, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The bins that are not empty, and how many scores are in each of them or above."""
    if not 0 <= share <= 1:
        raise InputError(f"a {name} must be between 0 and 1, not {share}")
    counts = np.asarray(counts, np.int64)
    if not counts.any():
        raise InputError("there are no images to calibrate thresholds on")
    bins = np.flatnonzero(counts)
    return bins, np.cumsum(counts[bins][::-1])[::-1]


def measure_scores(
    model: HasFFNs,
    batches: BatchSource,
    scores: Mapping[str, Score],
    active_selectors: Selectors | None = None,
    *,
    tile_size: int = 1,
) -> dict[str, ScoreHistogram]:
    """Histograms of the scores of every FFN; raises as `accumulate`.

    Args:
        model: the FFNs.
        batches: data that nothing was trained on; one pass is made.
        scores: of each FFN by name.
        active_selectors: selectors that are in effect meanwhile; None for the dense FFNs.
        tile_size: consecutive tokens that are computed together, see `score_histogram`.
    """
    measure = partial(_histograms, tile_size=tile_size)
    return accumulate(measure, model, batches, "calibrate thresholds", dict(scores), dict(active_selectors or {}))


@partial(jax.jit, static_argnames="tile_size")
def _histograms(
    model: HasFFNs, batch: Any, scores: Mapping[str, Score], running: Selectors, *, tile_size: int
) -> dict[str, ScoreHistogram]:
    weights, traces = model.ffn_weights(), model.traces(batch, running)
    return {name: score_histogram(score, weights[name], traces[name], tile_size) for name, score in scores.items()}


def calibrate(
    model: HasFFNs, batches: BatchSource, scores: Mapping[str, Score], threshold_of: Callable[[ScoreHistogram], float]
) -> dict[str, Thresholded]:
    """Selectors from the scores of each FFN by name, with a threshold for each, in one pass through the dense FFNs.

    `batches` are data that nothing was trained on; `threshold_of` is `density_threshold` or `recall_threshold` with its
    target.
    """
    histograms = measure_scores(model, batches, scores)
    return {name: Thresholded(scores[name], jnp.float32(threshold_of(found))) for name, found in histograms.items()}


def selectors_at_densities(
    model: HasFFNs,
    batches: BatchSource,
    method: Method,
    material: Mapping[str, FitMaterial],
    densities: Sequence[float],
) -> dict[str, tuple[Selector, ...]]:
    """The selectors of a method at some densities in each FFN, calibrated on the dense FFNs.

    Args:
        model: the FFNs.
        batches: data that nothing was trained on.
        method: any but those tuned by nothing.
        material: of each FFN by name.
        densities: from 0 to 1, the same for all FFNs.
    """
    histograms: dict[str, ScoreHistogram] = {}
    if method.tuned_by == "threshold":
        histograms = measure_scores(model, batches, {name: method.fit(of_ffn) for name, of_ffn in material.items()})

    def selectors(name: str) -> tuple[Selector, ...]:
        def threshold_of(density: float) -> float:
            return density_threshold(histograms[name], density)

        return method.at_densities(material[name], threshold_of, densities)

    return {name: selectors(name) for name in material}
