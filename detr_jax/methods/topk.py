"""The selector "the k largest": the same number of groups, neurons or channels for every token."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from detr_jax.methods.base import Score, Traits, ordered_bits, selection_of
from detr_jax.models import FFNWeights, Selection
from detr_jax.pytrees import pytree


@pytree
@dataclass(frozen=True)
class TopK:
    """Keeps the k largest scores of every token; where ties would make them more, the ones that tie are left out.

    Of hidden activations it is Li et al. 2023, "The Lazy Neuron Phenomenon": an accuracy bound, for it needs them all.

    Attributes:
        score: of the method.
        k: () int32.
    """

    score: Score
    k: jax.Array

    @property
    def traits(self) -> Traits:
        return self.score.traits

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> Selection:
        # A sort is slow; the k-th largest is found bit by bit.
        bits = ordered_bits(self.score(ffn, x, tokens))

        def with_one_more_bit(i, least):
            candidate = least | (jnp.uint32(1) << (31 - i))
            return jnp.where((bits >= candidate).sum(-1, keepdims=True) >= self.k, candidate, least)

        least = jax.lax.fori_loop(0, 32, with_one_more_bit, jnp.zeros((*bits.shape[:-1], 1), jnp.uint32))
        tied = (bits >= least).sum(-1, keepdims=True) > self.k
        return selection_of(self.score, jnp.where(tied, bits > least, bits >= least))

    def cost(self, d_model: int, features: int) -> float:
        """Multiply-adds per token of the score; comparisons are not counted."""
        return self.score.cost(d_model, features)
