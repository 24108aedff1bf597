"""The methods by their names in comparisons, each made from what it needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from detr_jax.calibration.activations import ActivationStatistics
from detr_jax.calibration.moments import CrossMoments, Moments
from detr_jax.calibration.reconstruction import obs_ranking, reconstruct_output
from detr_jax.calibration.thresholds import ScoreHistogram, density_threshold
from detr_jax.methods import (
    Fixed,
    Gate,
    HiddenMagnitude,
    InputMagnitude,
    Lots,
    LowRankCompensation,
    Pooled,
    Score,
    ShareOfLargest,
    Sketch,
    Standardised,
    Thresholded,
    TopK,
    by_contribution,
    by_firing,
    fit_pooled_statistics,
    low_rank_factors,
    sketch,
)
from detr_jax.models import FFNWeights, Selector


@dataclass(frozen=True)
class Ingredients:
    """What methods are made from, for one FFN.

    Attributes:
        weights: of the FFN.
        statistics: of its activations on training images.
        inputs: moments of its inputs on training images.
        hidden: moments of its hidden activations on training images.
        pooled: moments of its pooled inputs and contributions of whole training images.
        gates: trained ones by their names in `training.gates.KINDS`.
        group_size: neurons per group.
    """

    weights: FFNWeights
    statistics: ActivationStatistics
    inputs: Moments
    hidden: Moments
    pooled: CrossMoments
    gates: Mapping[str, Gate]
    group_size: int


@dataclass(frozen=True)
class Method:
    """A selector that can be given a density.

    Attributes:
        score: makes its score.
        by_rank: the same number for every token, instead of a threshold.
        rank: of the factors that what it leaves out goes through, at most; None leaves it out.
        refitted: fixed sets of neurons by elimination, with a fitted second layer, instead of those of the score.
        note: what stands beside it in tables.
    """

    score: Callable[[Ingredients], Score]
    by_rank: bool = False
    rank: int | None = None
    reconstructed: bool = False
    note: str = ""

    def at_densities(
        self, ingredients: Ingredients, histogram: ScoreHistogram, densities: Sequence[float]
    ) -> tuple[Selector, ...]:
        """The selectors of one FFN.

        Args:
            ingredients: of the FFN.
            histogram: of its scores on calibration images.
            densities: targets from 0 to 1.
        """
        score, weights = self.score(ingredients), ingredients.weights
        if self.reconstructed:
            survivors = obs_ranking(weights, ingredients.hidden)
            neurons = np.arange(len(survivors))
            sets = [np.isin(neurons, survivors[: round(density * len(neurons))]) for density in densities]
            return tuple(
                Fixed(jnp.asarray(kept), reconstruct_output(weights, ingredients.hidden, kept)) for kept in sets
            )
        if self.by_rank:
            return tuple(TopK(score, jnp.int32(round(density * len(weights.w_in)))) for density in densities)
        thresholds = (density_threshold(histogram, density) for density in densities)
        selectors = [Thresholded(score, jnp.float32(threshold)) for threshold in thresholds]
        if self.rank is not None:
            factors = low_rank_factors(weights, min(self.rank, *weights.w_in.shape))
            selectors = [LowRankCompensation(selector, factors) for selector in selectors]
        return tuple(selectors)


SKETCH_RANK = 16


def sketch_of(ingredients: Ingredients) -> Sketch:
    """The sketch of single neurons."""
    mean, covariance = ingredients.inputs.mean, ingredients.inputs.covariance
    return sketch(ingredients.weights, mean, covariance, min(SKETCH_RANK, len(mean)), 1)


METHODS = {
    "random": Method(lambda i: Lots(i.group_size)),
    "static, firing": Method(lambda i: by_firing(i.statistics, i.group_size)),
    "static, contribution": Method(lambda i: by_contribution(i.statistics, i.weights, i.group_size)),
    "static, refitted": Method(
        lambda i: by_contribution(i.statistics, i.weights, i.group_size), reconstructed=True, note="second layer fitted"
    ),
    "mgs": Method(lambda i: i.gates["firing"]),
    "mgs, contribution": Method(lambda i: i.gates["contribution"], note="labels weighted by contribution"),
    "mgs + rsparse": Method(lambda i: i.gates["firing"], rank=4, note="skipped groups through rank 4"),
    "dejavu": Method(lambda i: i.gates["balanced"]),
    "d2dmoe": Method(lambda i: ShareOfLargest(i.gates["norm"])),
    "stat-topk": Method(lambda i: Standardised(i.gates["firing"])),
    "core": Method(lambda i: Pooled(i.gates["firing"], odds=True)),
    "pooled inputs": Method(lambda i: fit_pooled_statistics(i.pooled, i.group_size, None)),
    "pooled features": Method(lambda i: i.gates["features"]),
    "pooled contributions": Method(lambda i: i.gates["contributions"]),
    "sketch": Method(lambda i: Pooled(sketch_of(i), odds=False), by_rank=True),
    "topk": Method(lambda i: HiddenMagnitude(weighted=False), by_rank=True, note="needs h: an accuracy bound"),
    "teal, hidden": Method(lambda i: HiddenMagnitude(weighted=False)),
    "teal, input": Method(lambda i: InputMagnitude(weighted=False)),
    "wina, hidden": Method(lambda i: HiddenMagnitude(weighted=True)),
    "wina, input": Method(lambda i: InputMagnitude(weighted=True)),
    "rsparse": Method(lambda i: InputMagnitude(weighted=False), rank=16, note="other channels through rank 16"),
}
"""Every method that can be given a density; `dense`, `oracle` and `sibs` cannot."""
