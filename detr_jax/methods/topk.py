"""The selector "the k largest": the same number of groups, neurons or channels for every token."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from detr_jax.methods.base import FitMaterial, Method, Score, Wrapper, ordered_bits, register, selection_of, storable
from detr_jax.methods.teal import HiddenMagnitude
from detr_jax.models import FFNWeights, Selection


@storable
class TopK(Wrapper):
    """Keeps the k largest scores of every token; where ties would make them more, the ones that tie are left out."""

    score: Score
    k: jax.Array
    """() int32."""

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> Selection:
        # A sort is slow; the k-th largest is found bit by bit.
        bits = ordered_bits(self.score(ffn, x, tokens))

        def with_one_more_bit(i: jax.Array, least: jax.Array) -> jax.Array:
            candidate = least | (jnp.uint32(1) << (31 - i))
            return jnp.where((bits >= candidate).sum(-1, keepdims=True) >= self.k, candidate, least)

        least = jax.lax.fori_loop(0, 32, with_one_more_bit, jnp.zeros((*bits.shape[:-1], 1), jnp.uint32))
        tied = (bits >= least).sum(-1, keepdims=True) > self.k
        return selection_of(self.score, jnp.where(tied, bits > least, bits >= least))


class ByRank(Method):
    """At a density, methods that keep equally many of every token instead of what reaches a threshold."""

    tuned_by = "density"

    def at_densities(
        self, material: FitMaterial, threshold_of: Callable[[float], float], densities: Sequence[float]
    ) -> tuple[TopK, ...]:
        """See `Method.at_densities`; scores are of single neurons."""
        score = self.fit(material)
        return tuple(TopK(score, jnp.int32(round(density * len(material.weights.w_in)))) for density in densities)


@register
class LazyNeuron(ByRank):
    """The k largest hidden activations: an accuracy bound, for it needs them all."""

    name = "topk"
    paper = 'Li et al. 2023, "The Lazy Neuron Phenomenon", arXiv 2210.06313'
    decides = "neuron"
    saves = "second"
    note = "needs h: an accuracy bound"

    def fit(self, material: FitMaterial) -> HiddenMagnitude:
        return HiddenMagnitude(weighted=False)
