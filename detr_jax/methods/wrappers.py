"""Scores and selectors made from others: one decision for many tokens, neurons in sections, low-rank compensation."""

import dataclasses
from dataclasses import field

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.errors import InputError
from detr_jax.methods.base import MethodSelector, Score, Thresholded, Traits, Wrapper, storable
from detr_jax.methods.tiles import mean_of_tokens
from detr_jax.models import FFNWeights, LowRankFactors, OutputLayer, Partition, Selection


@storable
class Pooled(Wrapper):
    """The mean of a score over all tokens of an image, or of each window of consecutive tokens."""

    of: Score
    odds: bool = field(metadata={"static": True})
    """The score is in log-odds; average the probabilities."""
    window: int | None = field(default=None, metadata={"static": True})
    """Tokens per window; None for whole images."""

    @property
    def unit(self) -> str | None:
        return "probability" if self.odds else getattr(self.of, "unit", None)

    @property
    def traits(self) -> Traits:
        return self.of.traits._replace(granularity="image", tile_size=self.window)

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        scores = self.of(ffn, x, tokens)
        return mean_of_tokens(jax.nn.sigmoid(scores) if self.odds else scores, tokens, self.window)


@storable
class PartitionedSelector:
    """Computes the first neurons always, asks a selector about the next ones, and never computes the rest.

    The permutation of the neurons, a part of a plan, brings them into their sections.
    """

    gate: MethodSelector | None
    """Selector of the gated neurons, as if the FFN had no others; None where there are none."""
    always: int = field(metadata={"static": True})
    """Number of neurons that are always computed."""
    gated: int = field(default=0, metadata={"static": True})
    """Number of neurons that the gate decides about."""
    second: OutputLayer | None = None
    """Output layer of the first two sections that makes up for the third; None for the FFN's own."""

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> Selection:
        sections = Partition(self.always, self.gated)
        if self.always + self.gated > len(ffn.w_in):
            raise ValueError(f"sections of {self.always} and {self.gated} neurons do not fit an FFN of {len(ffn.w_in)}")
        _, gated = sections.parts(ffn)
        selection = Selection() if self.gate is None else self.gate(gated, x, tokens)
        return dataclasses.replace(selection, sections=sections, second=self.second)

    @property
    def traits(self) -> Traits:
        return Traits("statistics", "neuron", "both", dynamic=False) if self.gate is None else self.gate.traits

    def cost(self, d_model: int, features: int) -> float:
        return 0.0 if self.gate is None else self.gate.cost(d_model, self.gated)


@storable
class LowRankCompensation(Wrapper):
    """A selector; what it leaves out goes through factors of low rank.

    Over a score of input channels it is R-Sparse; over a selector of hidden neurons the same idea for both matrices
    (our reading).
    """

    of: Thresholded
    factors: LowRankFactors

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> Selection:
        return dataclasses.replace(self.of(ffn, x, tokens), factors=self.factors)

    def cost(self, d_model: int, features: int) -> float:
        matrices = 1 if self.traits.granularity == "channel" else 2
        rank = self.factors.in_model.shape[0]
        return self.of.cost(d_model, features) + matrices * rank * (d_model + features)


def low_rank_factors(ffn: FFNWeights, rank: int) -> LowRankFactors:
    """The best factors of rank r of both matrices, see `truncated_svd`."""
    factors = (factor for matrix in (ffn.w_in, ffn.w_out) for factor in truncated_svd(matrix, rank))
    return LowRankFactors(*(jnp.asarray(factor, jnp.float32) for factor in factors))


def truncated_svd(matrix: jax.Array | np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(F, r) and (r, d) whose product is the best approximation of a matrix (F, d) by one of rank r.

    Raises an InputError if the rank is not from 1 to the number of channels.
    """
    if not 1 <= rank <= min(matrix.shape):
        raise InputError(f"the rank must be from 1 to {min(matrix.shape)}, not {rank}")
    left, values, right = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return left[:, :rank] * values[:rank], right[:rank]
