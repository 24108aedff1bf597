"""D2DMoE: a gate that regresses the norm of what each group adds to the output."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from detr_jax.methods.base import FitMaterial, Score, Wrapper, register, storable
from detr_jax.methods.mgs import MGS, mean_over_tokens, relative_output_norms
from detr_jax.models import FFNTrace, FFNWeights


@storable
class ShareOfLargest(Wrapper):
    """The output norm of a group, predicted by a gate's softplus, as a share of the token's largest; kept from
    (1 - tau) on."""

    of: Score

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        norms = jax.nn.softplus(self.of(ffn, x, tokens))
        return norms / jnp.maximum(norms.max(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


@register
class D2DMoE(MGS):
    """Squared error between the softplus of MGS's gate and ||h_g W_out,g||, in units of the mean of active groups."""

    name = "d2dmoe"
    paper = 'Szatkowski et al. 2024, "D2DMoE", arXiv 2310.04361'
    unit = None

    def loss(self, gate: Callable[..., jax.Array], weights: FFNWeights, trace: FFNTrace) -> jax.Array:
        scores = gate(weights, trace.inputs, trace.tokens)
        contributions = relative_output_norms(weights, trace, scores.shape[-1])
        return mean_over_tokens((jax.nn.softplus(scores) - contributions) ** 2, trace.tokens)

    def fit(self, material: FitMaterial) -> ShareOfLargest:
        return ShareOfLargest(material.gate)
