"""The feed-forward layer of the transformer: the one module that sparsity acts on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from detr_jax import kernels


class Selector(Protocol):
    """Decides which groups of hidden neurons are computed. A pytree, so that it passes through `jax.jit`."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., d) FFN inputs -> (..., G) bool, the active groups."""


Selectors = Mapping[str, Selector]
"""Selector of each sparse FFN by name ("encoder.0"); an FFN without one is dense."""


class FFNWeights(NamedTuple):
    """An FFN as arrays: relu(x W_in^T + b_in) W_out + b_out.

    Attributes:
        w_in: (F, d), neurons on rows.
        b_in: (F,).
        w_out: (F, d), neurons on rows.
        b_out: (d,).
    """

    w_in: jax.Array
    b_in: jax.Array
    w_out: jax.Array
    b_out: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FFNTrace:
    """What went through one FFN.

    Attributes:
        inputs: (batch, tokens, d).
        hidden: (batch, tokens, F), after the ReLU and before any gate.
        tokens: (batch, tokens) bool, false for tokens that are padding.
    """

    inputs: jax.Array
    hidden: jax.Array
    tokens: jax.Array


def trace(weights: FFNWeights, x: jax.Array, tokens: jax.Array) -> FFNTrace:
    """What goes through an FFN for inputs x (batch, tokens, d); `tokens` (batch, tokens) is false for padding."""
    return FFNTrace(x, kernels.hidden_activations(x, weights.w_in, weights.b_in), tokens)


class FFN(nnx.Module):
    """relu(x W_in^T + b_in) W_out + b_out, dense or restricted to the groups that a selector keeps.

    Both matrices are (F, d), neurons on rows, so that a group of neurons is a contiguous block of either.
    """

    def __init__(self, d_model: int, features: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        init = nnx.initializers.glorot_uniform()
        self.w_in = nnx.Param(init(rngs.params(), (features, d_model)))
        self.b_in = nnx.Param(jnp.zeros((features,)))
        self.w_out = nnx.Param(init(rngs.params(), (features, d_model)))
        self.b_out = nnx.Param(jnp.zeros((d_model,)))
        self.dtype = dtype

    def parameters(self) -> FFNWeights:
        """The parameters as they are stored."""
        return FFNWeights(self.w_in[...], self.b_in[...], self.w_out[...], self.b_out[...])

    def weights(self) -> FFNWeights:
        """The parameters in the compute dtype."""
        return FFNWeights(*(array.astype(self.dtype) for array in self.parameters()))

    def __call__(self, x: jax.Array, selector: Selector | None = None) -> jax.Array:
        active = None if selector is None else selector(x)
        return kernels.ffn(x.astype(self.dtype), *self.weights(), active)

    def trace(self, x: jax.Array, tokens: jax.Array) -> FFNTrace:
        """The hidden activations of inputs `x`; XLA shares the product with the call on the same inputs."""
        return trace(self.weights(), x.astype(self.dtype), tokens)
