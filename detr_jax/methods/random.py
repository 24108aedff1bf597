"""The control: random groups."""

from dataclasses import field

import jax

from detr_jax.methods.base import FitMaterial, Free, Method, Traits, register, storable
from detr_jax.methods.grouping import group_count
from detr_jax.models import FFNWeights


@register
@storable
class Random(Free, Method):
    """Other random groups for every token, the same ones in every run. Method and score in one."""

    traits = Traits("nothing", "group", "both")
    name = "random"
    paper = "-"

    group_size: int = field(default=8, metadata={"static": True})
    seed: int = field(default=0, metadata={"static": True})

    def fit(self, material: FitMaterial) -> "Random":
        return self

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        groups = group_count(ffn.w_in.shape[0], self.group_size)
        # Negative, because thresholds are finest near 0, where the few that low densities keep are.
        return -jax.random.uniform(jax.random.key(self.seed), (*x.shape[:-1], groups))
