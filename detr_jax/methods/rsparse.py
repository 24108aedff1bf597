"""R-Sparse: low-rank factors for what a selector leaves out."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.errors import InputError
from detr_jax.methods.base import Thresholded, Traits
from detr_jax.models import FFNWeights, LowRankFactors, Selection
from detr_jax.pytrees import pytree


@pytree
@dataclass(frozen=True)
class LowRankCompensation:
    """What a selector leaves out goes through factors of low rank.

    Zhang et al. 2025, "R-Sparse": the large input channels exactly, the rest through a rank-r factor, is this over
    `InputMagnitude`. Over a selector of hidden neurons it is the same idea for both matrices (our reading).

    Attributes:
        of: the selector.
        factors: of the FFN's matrices.
    """

    of: Thresholded
    factors: LowRankFactors

    @property
    def traits(self) -> Traits:
        return self.of.traits

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> Selection:
        selection = self.of(ffn, x, tokens)
        return dataclasses.replace(selection, factors=self.factors)

    def cost(self, d_model: int, features: int) -> float:
        matrices = 1 if self.traits.granularity == "channel" else 2
        rank = self.factors.in_model.shape[0]
        return self.of.cost(d_model, features) + matrices * rank * (d_model + features)


def low_rank_factors(ffn: FFNWeights, rank: int) -> LowRankFactors:
    """The best factors of rank r of both matrices, by singular value decomposition.

    Raises:
        ValueError: if the rank is below 1 or above the number of channels.
    """
    features, d_model = ffn.w_in.shape
    if not 1 <= rank <= min(features, d_model):
        raise InputError(f"the rank must be from 1 to {min(features, d_model)}, not {rank}")
    factors = []
    for matrix in (ffn.w_in, ffn.w_out):
        left, values, right = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
        factors += [left[:, :rank] * values[:rank], right[:rank]]
    return LowRankFactors(*(jnp.asarray(factor, jnp.float32) for factor in factors))
