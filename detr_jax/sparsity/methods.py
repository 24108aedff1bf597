"""The methods by their names in comparisons, each made from what it needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from detr_jax.model import FFNWeights, Selector
from detr_jax.sparsity.activations import ActivationStatistics
from detr_jax.sparsity.calibration import ScoreHistogram, density_threshold
from detr_jax.sparsity.selectors import (
    Compensated,
    Gate,
    HiddenMagnitude,
    InputMagnitude,
    Lots,
    Pooled,
    Score,
    ShareOfLargest,
    Standardised,
    Thresholded,
    TopK,
    by_contribution,
    by_firing,
    low_rank_factors,
)


@dataclass(frozen=True)
class Ingredients:
    """What methods are made from, for one FFN.

    Attributes:
        weights: of the FFN.
        statistics: of its activations on training images.
        gates: trained ones by kind: "firing", "contribution", "balanced", "norm".
        group_size: neurons per group.
    """

    weights: FFNWeights
    statistics: ActivationStatistics
    gates: Mapping[str, Gate]
    group_size: int


@dataclass(frozen=True)
class Method:
    """A selector that can be given a density.

    Attributes:
        score: makes its score.
        by_rank: the same number for every token, instead of a threshold.
        rank: of the factors that what it leaves out goes through, at most; None leaves it out.
        note: what stands beside it in tables.
    """

    score: Callable[[Ingredients], Score]
    by_rank: bool = False
    rank: int | None = None
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
        if self.by_rank:
            return tuple(TopK(score, jnp.int32(round(density * len(weights.w_in)))) for density in densities)
        thresholds = (density_threshold(histogram, density) for density in densities)
        selectors = [Thresholded(score, jnp.float32(threshold)) for threshold in thresholds]
        if self.rank is not None:
            factors = low_rank_factors(weights, min(self.rank, *weights.w_in.shape))
            selectors = [Compensated(selector, factors) for selector in selectors]
        return tuple(selectors)


METHODS = {
    "random": Method(lambda i: Lots(i.group_size)),
    "static, firing": Method(lambda i: by_firing(i.statistics, i.group_size)),
    "static, contribution": Method(lambda i: by_contribution(i.statistics, i.weights, i.group_size)),
    "mgs": Method(lambda i: i.gates["firing"]),
    "mgs, contribution": Method(lambda i: i.gates["contribution"], note="labels weighted by contribution"),
    "mgs + rsparse": Method(lambda i: i.gates["firing"], rank=4, note="skipped groups through rank 4"),
    "dejavu": Method(lambda i: i.gates["balanced"]),
    "d2dmoe": Method(lambda i: ShareOfLargest(i.gates["norm"])),
    "stat-topk": Method(lambda i: Standardised(i.gates["firing"])),
    "core": Method(lambda i: Pooled(i.gates["firing"], odds=True)),
    "topk": Method(lambda i: HiddenMagnitude(weighted=False), by_rank=True, note="needs h: an accuracy bound"),
    "teal, hidden": Method(lambda i: HiddenMagnitude(weighted=False)),
    "teal, input": Method(lambda i: InputMagnitude(weighted=False)),
    "wina, hidden": Method(lambda i: HiddenMagnitude(weighted=True)),
    "wina, input": Method(lambda i: InputMagnitude(weighted=True)),
    "rsparse": Method(lambda i: InputMagnitude(weighted=False), rank=16, note="other channels through rank 16"),
}
"""Every method that can be given a density; `dense`, `oracle` and `sibs` cannot."""
