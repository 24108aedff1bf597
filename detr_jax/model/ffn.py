"""The feed-forward layer of the transformer: the one module that sparsity acts on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

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

    def weights(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """(w_in, b_in, w_out, b_out) in the compute dtype."""
        return tuple(p[...].astype(self.dtype) for p in (self.w_in, self.b_in, self.w_out, self.b_out))

    def __call__(self, x: jax.Array, selector: Selector | None = None) -> jax.Array:
        active = None if selector is None else selector(x)
        return kernels.ffn(x.astype(self.dtype), *self.weights(), active)

    def trace(self, x: jax.Array, tokens: jax.Array) -> FFNTrace:
        """The hidden activations of inputs `x`; XLA shares the product with the call on the same inputs."""
        w_in, b_in, _, _ = self.weights()
        return FFNTrace(x, kernels.hidden_activations(x.astype(self.dtype), w_in, b_in), tokens)
