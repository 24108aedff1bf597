"""A method in one file outside the package, as CONTRIBUTING shows it: importing it is all that it takes."""

from dataclasses import field

import jax
import jax.numpy as jnp

from detr_jax.methods import FitMaterial, Method, Traits, register, storable
from detr_jax.models import FFNWeights


@storable
class InputSize:
    """The largest |x_i| of the token, the same for every group.

    Attributes:
        groups: G.
    """

    traits = Traits("nothing", "group", "both")

    groups: int = field(metadata={"static": True})

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        largest = jnp.abs(x.astype(jnp.float32)).max(-1, keepdims=True)
        # A little more for the first groups, so that no scores tie.
        return largest + 1e-3 * jnp.linspace(1, 0, self.groups)

    def cost(self, d_model: int, features: int) -> float:
        return 0.0


@register
class LargestInput(Method):
    """Computes the tokens with large inputs."""

    name = "largest-input"
    paper = "none"

    group_size: int = 4
    """Neurons per group."""

    def fit(self, material: FitMaterial) -> InputSize:
        return InputSize(len(material.weights.w_in) // self.group_size)
