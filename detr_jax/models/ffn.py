"""The feed-forward layer of the transformer: the one module that sparsity acts on."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from detr_jax import kernels
from detr_jax.errors import InputError
from detr_jax.models.selection import FFNWeights, Selection, Selector
from detr_jax.pytrees import pytree


@pytree
class FFNTrace:
    """Inputs and activations of one FFN."""

    inputs: jax.Array
    """(batch, tokens, d)."""
    hidden: jax.Array
    """(batch, tokens, F) after the ReLU, as the dense FFN has them for these inputs."""
    tokens: jax.Array
    """(batch, tokens) bool, false for tokens that do not count: padding, and images that only fill the batch."""
    selection: Selection
    """What was computed."""


def trace(weights: FFNWeights, x: jax.Array, tokens: jax.Array, selector: Selector | None = None) -> FFNTrace:
    """Trace of an FFN for inputs x (batch, tokens, d); `tokens` (batch, tokens) is false for padding."""
    selection = Selection() if selector is None else selector(weights, x, tokens)
    return FFNTrace(x, kernels.hidden_activations(x, weights.w_in, weights.b_in), tokens, selection)


def forward(weights: FFNWeights, x: jax.Array, selection: Selection) -> jax.Array:
    """Outputs (..., d) of an FFN for x (..., d) with a selection; the definition of what selections mean.

    With factors A_in B_in for W_in and A_out B_out for W_out, the channels of x that are left out go through the
    factors of the first matrix, and the neurons that are left out through the factors of both.
    """
    if selection.routed is not None:
        implementation = selection.execution.implementation if selection.execution else None
        routed = selection.routed
        return kernels.routed_ffn(x, routed.experts, routed.assignment, implementation=implementation)
    if selection.second is not None:
        w_out, b_out = (array.astype(x.dtype) for array in selection.second)
        weights = weights._replace(w_out=w_out, b_out=b_out)
    if selection.execution is not None:
        return _execute(weights, x, selection, selection.execution)
    if missing := len(weights.w_in) - len(weights.w_out):  # rows of neurons that are never computed
        weights = weights._replace(w_out=jnp.pad(weights.w_out, ((0, missing), (0, 0))))
    if selection.mask is not None:
        hidden = kernels.hidden_activations(x, weights.w_in, weights.b_in)
        return (hidden * kernels.expand_groups(selection.mask, hidden.shape[-1])) @ weights.w_out + weights.b_out
    active = selection.per_token(x.shape[:-1], weights.w_in.shape[0])
    if selection.channels is None and selection.factors is None:
        return kernels.ffn(x, *weights, active)
    factors = selection.factors
    kept = x if selection.channels is None else jnp.where(selection.channels, x, 0)
    before = kept @ weights.w_in.T + weights.b_in
    if selection.channels is not None and factors is not None:
        before += (x - kept) @ factors.in_model.T @ factors.in_neurons.T
    hidden = jax.nn.relu(before)
    if active is None:
        return hidden @ weights.w_out + weights.b_out
    active = kernels.expand_groups(active, hidden.shape[-1])
    outputs = jnp.where(active, hidden, 0) @ weights.w_out + weights.b_out
    if factors is not None:
        about = jax.nn.relu(x @ factors.in_model.T @ factors.in_neurons.T + weights.b_in)
        outputs += jnp.where(active, 0, about) @ factors.out_neurons @ factors.out_model
    return outputs


def _execute(weights: FFNWeights, x: jax.Array, selection: Selection, execution: kernels.Execution) -> jax.Array:
    of_always, of_gated = (None, weights) if selection.sections is None else selection.sections.parts(weights)
    always = None if of_always is None else kernels.ffn(x, *of_always)
    if selection.active is None:
        assert always is not None  # see `Executed`
        return always
    gated = kernels.sparse_ffn(x, of_gated, selection.active, execution, selection.tile_size)
    return gated if always is None else always + gated


def permute(weights: FFNWeights, permutation: np.ndarray) -> FFNWeights:
    """The same function with its hidden neurons in another order; `permutation` (F,) has the neuron of each place.

    Raises:
        InputError: if that is no permutation of the hidden neurons.
    """
    features = weights.w_in.shape[0]
    if permutation.shape != (features,) or not np.array_equal(np.sort(permutation), np.arange(features)):
        raise InputError(
            f"an order of {features} hidden neurons names each of them once; got shape {permutation.shape}"
        )
    return FFNWeights(weights.w_in[permutation], weights.b_in[permutation], weights.w_out[permutation], weights.b_out)


RunFFN = Callable[[str, jax.Array, jax.Array], jax.Array]
"""Computes an FFN by name for inputs (batch, tokens, d) and a mask (batch, tokens) that is false for padding."""


class FFN(nnx.Module):
    """relu(x W_in^T + b_in) W_out + b_out, dense or restricted to what a selector keeps.

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

    def __call__(self, x: jax.Array, tokens: jax.Array, selector: Selector | None = None) -> jax.Array:
        x = x.astype(self.dtype)
        return forward(self.weights(), x, Selection() if selector is None else selector(self.weights(), x, tokens))

    def trace(self, x: jax.Array, tokens: jax.Array, selector: Selector | None = None) -> FFNTrace:
        """Trace of a call; under `jax.jit` XLA shares the work with the call on the same inputs."""
        return trace(self.weights(), x.astype(self.dtype), tokens, selector)
