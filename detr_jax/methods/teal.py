"""TEAL: thresholds on the magnitudes of hidden activations or of input channels."""

from dataclasses import field

import jax
import jax.numpy as jnp

from detr_jax.kernels import hidden_activations
from detr_jax.methods.base import FitMaterial, Method, Traits, register, storable
from detr_jax.models import FFNWeights


@storable
class HiddenMagnitude:
    """`|h_j|`, or, weighted (WINA), `|h_j| ||W_out[j]||`: takes the whole first product and saves the second.

    Thresholds are observed quantiles; TEAL's shortcut for symmetric distributions does not hold after a ReLU.
    """

    traits = Traits("statistics", "neuron", "second")

    weighted: bool = field(metadata={"static": True})

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        hidden = hidden_activations(x, ffn.w_in, ffn.b_in).astype(jnp.float32)
        return hidden * jnp.linalg.norm(ffn.w_out.astype(jnp.float32), axis=1) if self.weighted else hidden

    def cost(self, d_model: int, features: int) -> float:
        return float(features) if self.weighted else 0.0


@storable
class InputMagnitude:
    """`|x_i|`, or, weighted (WINA), `|x_i| ||W_in[:, i]||`: leaves channels out of the first product."""

    traits = Traits("statistics", "channel", "first")

    weighted: bool = field(metadata={"static": True})

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        size = jnp.abs(x.astype(jnp.float32))
        return size * jnp.linalg.norm(ffn.w_in.astype(jnp.float32), axis=0) if self.weighted else size

    def cost(self, d_model: int, features: int) -> float:
        return float(d_model) if self.weighted else 0.0


@register
class TEALHidden(Method):
    """Thresholds on `|h_j|`."""

    name = "teal-hidden"
    paper = 'Liu et al. 2025, "TEAL", arXiv 2408.14690'
    decides = "neuron"
    saves = "second"
    weighted = False

    def fit(self, material: FitMaterial) -> HiddenMagnitude:
        return HiddenMagnitude(self.weighted)


@register
class TEALInput(Method):
    """Thresholds on `|x_i|`."""

    name = "teal-input"
    paper = TEALHidden.paper
    decides = "channel"
    saves = "first"
    weighted = False

    def fit(self, material: FitMaterial) -> InputMagnitude:
        return InputMagnitude(self.weighted)
