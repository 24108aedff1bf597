"""Calibration passes: what scores are on held-out images, and from that the thresholds."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.calibration.accumulate import accumulate
from detr_jax.calibration.thresholds import ScoreHistogram, density_threshold, score_histogram
from detr_jax.data.batches import BatchSource
from detr_jax.errors import InputError
from detr_jax.mesh import replicate_like, to_host
from detr_jax.methods import FitMaterial, Method, Score, Thresholded
from detr_jax.methods.base import SharedScore
from detr_jax.methods.tiles import existing_tiles
from detr_jax.models import Selector, Selectors
from detr_jax.models.base import HasFFNs


@partial(jax.jit, static_argnames="tile_size")
def _histograms(model, batch, scores, running, *, tile_size):
    weights = model.ffn_weights()
    traces = model.traces(batch, running)
    return {name: score_histogram(score, weights[name], traces[name], tile_size) for name, score in scores.items()}


def measure_scores(
    model: HasFFNs,
    batches: BatchSource,
    scores: Mapping[str, Score],
    active_selectors: Selectors | None = None,
    *,
    tile_size: int = 1,
) -> dict[str, ScoreHistogram]:
    """How the scores of every FFN are distributed.

    Args:
        model: the FFNs.
        batches: data that nothing was trained on; one pass is made.
        scores: of each FFN by name.
        active_selectors: selectors that are in effect meanwhile; None for the dense FFNs.
        tile_size: consecutive tokens that are computed together, see `score_histogram`.

    Raises:
        ValueError: if there are no images.
    """
    measure = partial(_histograms, tile_size=tile_size)
    return accumulate(measure, model, batches, "calibrate thresholds", dict(scores), dict(active_selectors or {}))


def collect_scores(model: HasFFNs, batches: BatchSource, scores: Mapping[str, SharedScore]) -> dict[str, np.ndarray]:
    """All scores of decisions that many tokens share.

    Args:
        model: the FFNs, which run dense.
        batches: data; one pass is made.
        scores: of each FFN by name.

    Returns:
        by name (decisions, G), those of padding alone left out.

    Raises:
        ValueError: if there are no images.
    """
    scores = replicate_like(model, dict(scores))
    found = [to_host(_scores(model, batch, scores)) for batch in batches.batches()]
    if not found:
        raise InputError("there are no images to calibrate thresholds on")
    return {name: np.concatenate([batch[name][0][batch[name][1]] for batch in found]) for name in scores}


@jax.jit
def _scores(model, batch, scores):
    """Scores (images, decisions, G), and which decisions are about any token."""
    weights = model.ffn_weights()

    def of_ffn(score, weights, trace):
        exists = existing_tiles(trace.tokens, score.traits.tile_size or trace.tokens.shape[-1])
        return score(weights, trace.inputs, trace.tokens), exists

    return {
        name: of_ffn(scores[name], weights[name], trace)
        for name, trace in model.traces(batch, {}).items()
        if name in scores
    }


def calibrate(
    model: HasFFNs,
    batches: BatchSource,
    scores: Mapping[str, Score],
    threshold_of: Callable[[ScoreHistogram], float],
    *,
    in_turn: bool = False,
    tile_size: int = 1,
) -> dict[str, Thresholded]:
    """Selectors from scores, each with a threshold of its own.

    Args:
        model: the FFNs.
        batches: data that nothing was trained on.
        scores: of each FFN by name, in the order in which they run.
        threshold_of: makes a threshold of a histogram: `density_threshold` or `recall_threshold` with its target.
        in_turn: calibrate each on the inputs that the earlier ones leave it, one pass per FFN, instead of all on the
            dense FFNs in one pass.
        tile_size: consecutive tokens that are computed together: densities and recalls are those of tiles.
    """
    open_ = {name: Thresholded(score, jnp.float32(-jnp.inf)) for name, score in scores.items()}
    if not in_turn:
        histograms = measure_scores(model, batches, scores, tile_size=tile_size)
        return {name: open_[name].at(threshold_of(histogram)) for name, histogram in histograms.items()}
    chosen = dict(open_)
    for name in scores:
        histogram = measure_scores(model, batches, scores, chosen, tile_size=tile_size)[name]
        chosen[name] = open_[name].at(threshold_of(histogram))
    return chosen


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
    histograms = {}
    if method.tuned_by == "threshold":
        histograms = measure_scores(model, batches, {name: method.fit(of_ffn) for name, of_ffn in material.items()})
    return {
        name: method.at_densities(of_ffn, partial(density_threshold, histograms.get(name)), densities)
        for name, of_ffn in material.items()
    }
