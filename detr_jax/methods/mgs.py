"""MGS: one linear gate per FFN, trained to tell which groups of neurons are active."""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from detr_jax.methods.base import TrainedMethod, Traits, Unit, register, storable
from detr_jax.methods.grouping import active_groups, group_count, group_output_norms
from detr_jax.models import FFNTrace, FFNWeights

PAPER_THRESHOLD = 0.5
"""On the probability that a group is active."""


@storable
class LinearGate:
    """One linear layer, (d, G) and (G,) float32; its scores are the log-odds that a group is active."""

    traits = Traits("training", "group", "both")
    unit = "log-odds"

    kernel: jax.Array
    bias: jax.Array

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) @ self.kernel + self.bias

    def cost(self, d_model: int, features: int) -> float:
        return float(self.kernel.size)


@register
class MGS(TrainedMethod):
    """Micro-Gated Sparsification: binary cross-entropy with whether a neuron of the group is active."""

    name = "mgs"
    paper = "Sedghi et al. 2025, arXiv 2510.09380"
    unit: ClassVar[Unit | None] = "log-odds"

    def init(self, shape: tuple[int, int], key: jax.Array) -> LinearGate:
        features, d_model = shape
        groups = group_count(features, self.group_size)
        # The loss of one linear layer is convex, so that zeros are as good a start as any.
        return LinearGate(jnp.zeros((d_model, groups)), jnp.zeros(groups))

    def loss(self, gate: Callable[..., jax.Array], weights: FFNWeights, trace: FFNTrace) -> jax.Array:
        scores = gate(weights, trace.inputs, trace.tokens)
        active = active_groups(trace.hidden, scores.shape[-1])
        return mean_over_tokens(optax.sigmoid_binary_cross_entropy(scores, active.astype(scores.dtype)), trace.tokens)


@register
class MGSContribution(MGS):
    """MGS whose active groups weigh as much as they add to the output, in units of the mean."""

    name = "mgs-contribution"
    note = "labels weighted by contribution"

    def loss(self, gate: Callable[..., jax.Array], weights: FFNWeights, trace: FFNTrace) -> jax.Array:
        scores = gate(weights, trace.inputs, trace.tokens)
        active = active_groups(trace.hidden, scores.shape[-1])
        contributions = relative_output_norms(weights, trace, scores.shape[-1])
        losses = optax.sigmoid_binary_cross_entropy(scores, active.astype(scores.dtype))
        return mean_over_tokens(jnp.where(active, losses * contributions, losses), trace.tokens)


def mean_over_tokens(values: jax.Array, tokens: jax.Array) -> jax.Array:
    """The mean () of (batch, tokens, n) over the tokens that exist, (batch, tokens) bool, and n."""
    counted = tokens[..., None]
    return jnp.where(counted, values, 0).sum() / jnp.maximum(counted.sum() * values.shape[-1], 1)


def relative_output_norms(weights: FFNWeights, trace: FFNTrace, groups: int) -> jax.Array:
    """(batch, tokens, G): ||h_g W_out,g|| in units of the mean of active groups; 0 in padding."""
    counted = trace.tokens[..., None]
    # Padding may add to the output; in a unit that is 0 without it, that would be infinitely much.
    norms = jnp.where(counted, group_output_norms(weights, trace.hidden, groups), 0)
    unit = norms.sum() / jnp.maximum((active_groups(trace.hidden, groups) & counted).sum(), 1)
    return norms / jnp.maximum(unit, jnp.finfo(jnp.float32).tiny)
