"""The control that a dynamic method has to beat: the same groups for every token, an ordinary narrower FFN."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.calibration.activations import ActivationStatistics
from detr_jax.methods.base import Traits, group_sums
from detr_jax.methods.grouping import group_count
from detr_jax.models import FFNWeights, OutputLayer, Selection
from detr_jax.pytrees import pytree


@pytree
@dataclass(frozen=True)
class Importance:
    """A fixed score for each group.

    Attributes:
        importance: (G,) float32.
    """

    traits: ClassVar = Traits("statistics", "group", "both", dynamic=False)

    importance: jax.Array

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.broadcast_to(self.importance, (*x.shape[:-1], *self.importance.shape))

    def cost(self, d_model: int, features: int) -> float:
        return 0.0


@pytree
@dataclass(frozen=True)
class Fixed:
    """Groups that are chosen once for all; `PartitionedSelector` does so for neurons that a permutation collected.

    Attributes:
        kept: (G,) bool.
        second: a second layer, of all neurons, that makes up for the other groups; None for the FFN's own.
    """

    traits: ClassVar = Traits("statistics", "group", "both", dynamic=False, tile_size=None)

    kept: jax.Array
    second: OutputLayer | None = None

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> Selection:
        kept = jnp.broadcast_to(self.kept, (*x.shape[:-2], 1, *self.kept.shape))
        return Selection(active=kept, second=self.second, tile_size=None)

    def cost(self, d_model: int, features: int) -> float:
        return 0.0


def by_firing(statistics: ActivationStatistics, group_size: int) -> Importance:
    """How often the neurons of a group fire, per token."""
    return _of_groups(statistics.fired.sum(0), statistics, group_size)


def by_contribution(statistics: ActivationStatistics, ffn: FFNWeights, group_size: int) -> Importance:
    """The sum over tokens and a group's neurons of h_j ||W_out[j]||, per token."""
    norms = np.linalg.norm(np.asarray(ffn.w_out, np.float64), axis=1)
    return _of_groups(statistics.hidden.sum(0) * norms, statistics, group_size)


def _of_groups(per_neuron: np.ndarray, statistics: ActivationStatistics, group_size: int) -> Importance:
    per_token = per_neuron / max(int(statistics.tokens.sum()), 1)
    return Importance(jnp.asarray(group_sums(per_token, group_count(len(per_neuron), group_size)), jnp.float32))
