"""Deja Vu: a gate of low rank, trained on balanced labels."""

import jax
import jax.numpy as jnp
import optax

from detr_jax.errors import InputError
from detr_jax.methods.base import TrainedMethod, Traits, register, storable
from detr_jax.methods.grouping import active_groups, group_count
from detr_jax.methods.mgs import mean_over_tokens
from detr_jax.models import FFNTrace, FFNWeights


@storable
class LowRankGate:
    """Two linear layers with nothing between them, (d, r), (r, G) and (G,) float32; log-odds as of `LinearGate`."""

    traits = Traits("training", "group", "both")
    unit = "log-odds"

    down: jax.Array
    up: jax.Array
    bias: jax.Array

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) @ self.down @ self.up + self.bias

    def cost(self, d_model: int, features: int) -> float:
        return float(self.down.size + self.up.size)


@register
class DejaVu(TrainedMethod):
    """Binary cross-entropy in which inactive groups weigh as much as the share of active ones + 0.005."""

    name = "dejavu"
    paper = 'Liu et al. 2023, "Deja Vu", arXiv 2310.17157'
    unit = "log-odds"

    rank: int = 16
    """Of the gate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise InputError(f"the rank of a gate must be at least 1, not {self.rank}")

    def init(self, shape: tuple[int, int], key: jax.Array) -> LowRankGate:
        features, d_model = shape
        groups = group_count(features, self.group_size)
        # Of two layers, one must differ from 0 to have a gradient.
        down = jax.nn.initializers.lecun_normal()(key, (d_model, self.rank))
        return LowRankGate(down, jnp.zeros((self.rank, groups)), jnp.zeros(groups))

    def loss(self, gate: LowRankGate, weights: FFNWeights, trace: FFNTrace) -> jax.Array:
        scores = gate(weights, trace.inputs, trace.tokens)
        active = active_groups(trace.hidden, scores.shape[-1])
        counted = trace.tokens[..., None]
        losses = optax.sigmoid_binary_cross_entropy(scores, active.astype(scores.dtype))
        density = (active & counted).sum() / jnp.maximum(counted.sum() * active.shape[-1], 1)
        return mean_over_tokens(jnp.where(active, losses, losses * (density + 0.005)), trace.tokens)
