"""The bound: exactly the active groups."""

from dataclasses import field

import jax

from detr_jax.kernels import hidden_activations
from detr_jax.methods.base import FitMaterial, Free, Method, Traits, register, storable
from detr_jax.methods.grouping import active_groups, group_count
from detr_jax.models import FFNWeights, Selection


@register
@storable
class Oracle(Free, Method):
    """Keeps the groups with an activation above 0: the output is the dense one. Method and selector in one.

    A bound, for the cost of knowing the activations is not counted; groups of 1 bound all methods that decide token by
    token.
    """

    traits = Traits("nothing", "group", "both")
    name = "oracle"
    paper = "-"
    tuned_by = "nothing"

    group_size: int = field(default=8, metadata={"static": True})

    def fit(self, material: FitMaterial) -> "Oracle":
        return self

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> Selection:
        hidden = hidden_activations(x, ffn.w_in, ffn.b_in)
        return Selection(active=active_groups(hidden, group_count(hidden.shape[-1], self.group_size)))
