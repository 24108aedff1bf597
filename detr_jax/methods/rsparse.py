"""R-Sparse: large input channels exactly, the rest through factors of low rank."""

from detr_jax.methods.base import FitMaterial, Method, Thresholded, register
from detr_jax.methods.mgs import MGS
from detr_jax.methods.teal import InputMagnitude
from detr_jax.methods.wrappers import LowRankCompensation, low_rank_factors
from detr_jax.models import FFNWeights


class _Compensated:
    """Selectors with `rank` factors; fewer where an FFN has fewer channels."""

    rank: int

    def finish(self, selector: Thresholded, weights: FFNWeights) -> LowRankCompensation:
        return LowRankCompensation(selector, low_rank_factors(weights, min(self.rank, *weights.w_in.shape)))


@register
class RSparse(_Compensated, Method):
    """Thresholds on `|x_i|`; channels below go through a factor of W_in."""

    name = "rsparse"
    paper = 'Zhang et al. 2025, "R-Sparse", arXiv 2504.19449'
    decides = "channel"
    saves = "first"
    note = "other channels through a factor"

    rank: int = 16
    """Of the factors."""

    def fit(self, material: FitMaterial) -> InputMagnitude:
        return InputMagnitude(weighted=False)


@register
class MGSRSparse(_Compensated, MGS):
    """MGS whose skipped groups go through factors of both matrices."""

    name = "mgs-rsparse"
    note = "skipped groups through a factor"

    rank: int = 4
    """Of the factors."""
