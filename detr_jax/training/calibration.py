"""Calibration passes: what scores are on held-out images, and from that the thresholds."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from detr_jax.model import Selectors
from detr_jax.sparsity.calibration import ScoreHistogram, score_histogram, total_histograms
from detr_jax.sparsity.carrier import FFNCarrier
from detr_jax.sparsity.selectors import Score, Thresholded
from detr_jax.training.passes import Passes


@jax.jit
def _histograms(carrier, batch, scores, running):
    weights = carrier.ffn_weights()
    traces = carrier.traces(batch, running)
    return {name: score_histogram(score, weights[name], traces[name]) for name, score in scores.items()}


def measure_scores(
    carrier: FFNCarrier, passes: Passes, scores: Mapping[str, Score], running: Selectors | None = None
) -> dict[str, ScoreHistogram]:
    """How the scores of every FFN are distributed.

    Args:
        carrier: of the FFNs.
        passes: data that nothing was trained on; one pass is made.
        scores: of each FFN by name.
        running: selectors that are in effect meanwhile; None for the dense FFNs.

    Raises:
        ValueError: if there are no images.
    """
    scores, running = dict(scores), dict(running or {})
    return total_histograms(jax.device_get(_histograms(carrier, b, scores, running)) for b in passes.batches())


def calibrate(
    carrier: FFNCarrier,
    passes: Passes,
    scores: Mapping[str, Score],
    threshold_of: Callable[[ScoreHistogram], float],
    *,
    in_turn: bool = False,
) -> dict[str, Thresholded]:
    """Selectors from scores, each with a threshold of its own.

    Args:
        carrier: of the FFNs.
        passes: data that nothing was trained on.
        scores: of each FFN by name, in the order in which they run.
        threshold_of: makes a threshold of a histogram: `density_threshold` or `recall_threshold` with its target.
        in_turn: calibrate each on the inputs that the earlier ones leave it, one pass per FFN, instead of all on the
            dense FFNs in one pass.
    """
    open_ = {name: Thresholded(score, jnp.float32(-jnp.inf)) for name, score in scores.items()}
    if not in_turn:
        return {n: open_[n].at(threshold_of(h)) for n, h in measure_scores(carrier, passes, scores).items()}
    chosen = dict(open_)
    for name in scores:
        histogram = measure_scores(carrier, passes, scores, chosen)[name]
        chosen[name] = open_[name].at(threshold_of(histogram))
    return chosen
