"""The control for dynamic methods: the same groups for every token, an ordinary narrower FFN."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.methods.base import FitMaterial, Free, Method, Traits, group_sums, register, storable
from detr_jax.methods.grouping import group_count
from detr_jax.methods.reconstruction import obs_ranking, reconstruct_output
from detr_jax.models import FFNWeights, OutputLayer, Selection

if TYPE_CHECKING:
    from detr_jax.calibration.activations import ActivationStatistics


@storable
class Importance(Free):
    """A fixed score for each group, (G,) float32."""

    traits = Traits("statistics", "group", "both", dynamic=False)

    importance: jax.Array

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.broadcast_to(self.importance, (*x.shape[:-1], *self.importance.shape))


@storable
class Fixed(Free):
    """Groups that are chosen once for all; `PartitionedSelector` does so for neurons that a permutation collected."""

    traits = Traits("statistics", "group", "both", dynamic=False, tile_size=None)

    kept: jax.Array
    """(G,) bool."""
    second: OutputLayer | None = None
    """An output layer, of all neurons, that makes up for the other groups; None for the FFN's own."""

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> Selection:
        kept = jnp.broadcast_to(self.kept, (*x.shape[:-2], 1, *self.kept.shape))
        return Selection(active=kept, second=self.second, tile_size=None)


def by_activity(statistics: "ActivationStatistics", group_size: int) -> Importance:
    """How often the neurons of a group are active, per token."""
    return _of_groups(np.asarray(statistics.fired).sum(0), statistics, group_size)


def by_contribution(statistics: "ActivationStatistics", ffn: FFNWeights, group_size: int) -> Importance:
    """The sum over tokens and a group's neurons of h_j ||W_out[j]||, per token."""
    norms = np.linalg.norm(np.asarray(ffn.w_out, np.float64), axis=1)
    return _of_groups(np.asarray(statistics.hidden).sum(0) * norms, statistics, group_size)


def _of_groups(per_neuron: np.ndarray, statistics: "ActivationStatistics", group_size: int) -> Importance:
    per_token = per_neuron / max(int(statistics.tokens.sum()), 1)
    return Importance(jnp.asarray(group_sums(per_token, group_count(len(per_neuron), group_size)), jnp.float32))


@register
class StaticFiring(Method):
    """The groups whose neurons are active most often."""

    name = "static-firing"
    paper = "-"
    dynamic = False
    requires = frozenset({"activations"})

    group_size: int = 8
    """Neurons per group."""

    def fit(self, material: FitMaterial) -> Importance:
        return by_activity(material.activations, self.group_size)


@register
class StaticContribution(StaticFiring):
    """The groups with the largest mean of h_j ||W_out[j]||."""

    name = "static-contribution"

    def fit(self, material: FitMaterial) -> Importance:
        return by_contribution(material.activations, material.weights, self.group_size)


@register
class StaticReconstructed(Method):
    """Neurons that survive elimination (`obs_ranking`), with an output layer fitted to them."""

    name = "static-reconstructed"
    paper = "Hassibi and Stork 1992, for whole neurons"
    decides = "neuron"
    dynamic = False
    requires = frozenset({"hidden_moments"})
    tuned_by = "density"
    note = "output layer reconstructed"

    def at_densities(
        self, material: FitMaterial, threshold_of: Callable[[float], float], densities: Sequence[float]
    ) -> tuple[Fixed, ...]:
        weights, moments = material.weights, material.hidden_moments
        survivors = obs_ranking(weights, moments)
        neurons = np.arange(len(survivors))
        sets = [np.isin(neurons, survivors[: round(density * len(neurons))]) for density in densities]
        return tuple(Fixed(jnp.asarray(kept), reconstruct_output(weights, moments, kept)) for kept in sets)
