"""The bound: exactly the active groups."""

from dataclasses import dataclass, field
from typing import ClassVar

import jax

from detr_jax.kernels import hidden_activations
from detr_jax.methods.base import FitMaterial, Method, Traits, register, storable
from detr_jax.methods.grouping import active_groups, group_count
from detr_jax.models import FFNWeights, Selection


@register
@storable
@dataclass(frozen=True)
class Oracle(Method):
    """Keeps the groups with an activation above 0: the output is the dense one.

    A bound: it knows the activations, and what knowing them costs is not counted. Method and selector in one.

    Attributes:
        group_size: neurons per group; 1 bounds every method that decides token by token.
    """

    traits: ClassVar = Traits("nothing", "group", "both")
    name: ClassVar = "oracle"
    paper: ClassVar = "-"
    tuned_by: ClassVar = "nothing"

    group_size: int = field(default=8, metadata={"static": True})

    def fit(self, material: FitMaterial) -> "Oracle":
        return self

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> Selection:
        hidden = hidden_activations(x, ffn.w_in, ffn.b_in)
        return Selection(active=active_groups(hidden, group_count(hidden.shape[-1], self.group_size)))

    def cost(self, d_model: int, features: int) -> float:
        return 0.0
