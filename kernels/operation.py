"""The sparse FFN over all implementations: every tile of tokens computes the blocks of neurons that it needs."""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from detr_jax.errors import InputError
from detr_jax.kernels import reference
from detr_jax.kernels.backend import FFNShape, FFNWeights
from detr_jax.kernels.block_masks import BlockLists, any_per_tile, indices_to_mask, mask_to_indices, repeat_per_tile
from detr_jax.kernels.dispatch import Dispatch, choose
from detr_jax.kernels.token_sorting import signature_order
from detr_jax.kernels.transforms import batched, on_each_shard


@dataclass(frozen=True)
class Execution:
    """How an FFN is computed when groups of its neurons are left out.

    Attributes:
        tile_size: tokens that share their blocks; None for all tokens of an image.
        block_size: neurons of a block; None for the fewest groups of the selector that the implementation takes.
        exact: whether a token gets only its own groups of the blocks that its tile computes. Otherwise it gets the
            whole blocks, which is closer to the dense FFN and costs nothing.
        ordered: whether tokens that need the same groups are brought together into tiles, and back afterwards.
        implementation: name of one, see `dispatch.IMPLEMENTATIONS`; None for the fastest on the device.
    """

    tile_size: int | None = None
    block_size: int | None = None
    exact: bool = False
    ordered: bool = False
    implementation: str | None = None

    def dispatch(self, x: jax.Array | jax.ShapeDtypeStruct, hidden: int, groups: int) -> Dispatch:
        """How `sparse_ffn` computes x (..., tokens, d) on the default device, with F `hidden` neurons in G `groups`.

        Raises:
            InputError: if blocks of that size do not divide the neurons, or `UnavailableError`, see `choose`.
        """
        size = hidden // groups if self.block_size is None else self.block_size
        if size < 1 or hidden % size:
            raise InputError(f"{hidden} hidden neurons cannot be divided into blocks of {size}")
        shape = FFNShape(x.dtype, self.tile_size or x.shape[-2], x.shape[-1], hidden, size, math.prod(x.shape[:-1]))
        return choose(shape, self.implementation, size if self.block_size is None else None)


def sparse_ffn(
    x: Float[Array, "batch tokens d"],
    weights: FFNWeights,
    active: Bool[Array, "batch decisions G"],
    execution: Execution,
    shared_by: int | None = 1,
) -> Float[Array, "batch tokens d"]:
    """The FFN with the groups that its tokens need; jit it together with the decision about `active`.

    Args:
        x: inputs.
        weights: of the FFN.
        active: the groups of F / G consecutive neurons that are needed; padding should need nothing.
        execution: tiles, blocks and implementation.
        shared_by: consecutive tokens that a decision is about; None for all of an image.

    Raises:
        ValueError: if blocks of that size do not divide the neurons or consist of whole groups, or see
            `block_sparse_ffn`.
    """
    return on_each_shard(partial(_sparse_ffn, execution, shared_by), x, weights, active)


def _sparse_ffn(execution, shared_by, x, weights, active):
    features, tokens = weights.w_in.shape[0], x.shape[-2]
    block_size = execution.dispatch(x, features, active.shape[-1]).block_size
    shared_by, tile_size = shared_by or tokens, execution.tile_size or tokens
    at_once = shared_by == tile_size and not (execution.exact or execution.ordered)
    if not at_once and shared_by != 1:
        active = repeat_per_tile(active, tokens, shared_by)
    if execution.ordered:
        order = signature_order(active, active.any(-1))[..., None]
        x, active = (jnp.take_along_axis(array, order, axis=1) for array in (x, active))
    needed = any_per_tile(active, 1 if at_once else tile_size, features // block_size)
    exact = active if execution.exact else None
    outputs = block_sparse_ffn(x, weights, needed, tile_size, active=exact, implementation=execution.implementation)
    if execution.ordered:
        outputs = jnp.take_along_axis(outputs, jnp.argsort(order, axis=1), axis=1)
    return outputs


def block_sparse_ffn(
    x: Float[Array, "*batch tokens d"],
    weights: FFNWeights,
    needed: Shaped[Array, "*batch tiles B"] | BlockLists,
    tile_size: int,
    *,
    blocks: int | None = None,
    active: Bool[Array, "*batch tokens G"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch tokens d"]:
    """The FFN of which every tile of consecutive tokens computes, for all of its tokens, the blocks that it needs.

    Same values as `reference.block_sparse_ffn`, whose derivatives it has too. Maps over a batch with `jax.vmap` as it
    does with leading axes, and runs inside `jax.shard_map` over tokens or images.

    Args:
        x: float32 or bfloat16.
        weights: of the FFN, of the same type.
        needed: (..., tiles, B) bool; or lists of blocks, in any order and with repetitions, which need `blocks`.
        tile_size: tokens per tile; the last tile may be shorter.
        blocks: B, where `needed` is lists.
        active: with G a multiple of B: the exact mode, see `reference.block_sparse_ffn`.
        implementation: name of one; None for the fastest on the device, which above the device's break-even density is
            the dense FFN, decided on the device.

    Raises:
        ValueError: if shapes or types do not fit, or the implementation cannot compute this; it says why.
    """
    if isinstance(needed, BlockLists):
        if blocks is None:
            raise ValueError("lists of blocks do not say how many blocks there are: name `blocks`")
        needed = indices_to_mask(needed, blocks)
    _check(x, weights, needed, tile_size, active)
    if 0 in x.shape:
        return jnp.zeros_like(x)
    hidden, d = weights.w_in.shape
    shape = FFNShape(x.dtype, tile_size, d, hidden, hidden // needed.shape[-1], math.prod(x.shape[:-1]))
    dispatch = choose(shape, implementation)

    def flattened(x, weights, needed, active):
        flat = partial(jax.tree.map, lambda array: array.reshape(-1, *array.shape[-2:]))
        return _differentiable(dispatch, tile_size, flat(x), weights, flat(needed), flat(active)).reshape(x.shape)

    return on_each_shard(flattened, x, weights, needed, active)


def _check(x, weights, needed, tile_size, active):
    d, features = x.shape[-1], weights.w_in.shape[0]
    shapes = [array.shape for array in weights]
    if shapes != [(features, d), (features,), (features, d), (d,)]:
        raise ValueError(
            f"weights of shapes {shapes} do not fit inputs of {d} features: (F, {d}), (F,), (F, {d}), ({d},) would"
        )
    if tile_size < 1:
        raise InputError(f"a tile must have at least 1 token, not {tile_size}")
    blocks, tiles = needed.shape[-1], (*x.shape[:-2], -(-x.shape[-2] // tile_size))
    if needed.dtype != bool or needed.shape[:-1] != tiles:
        raise ValueError(
            f"inputs {x.shape} in tiles of {tile_size} tokens need a bool map {(*tiles, 'B')}, not {needed.dtype} "
            f"{needed.shape}"
        )
    if features % blocks:
        raise ValueError(f"{features} hidden neurons cannot be divided into {blocks} blocks of equal size")
    if active is not None and (active.shape[:-1] != x.shape[:-1] or active.shape[-1] % blocks):
        raise ValueError(
            f"the groups of tokens must be {(*x.shape[:-1], 'G')} with G a multiple of {blocks} blocks, not "
            f"{active.shape}"
        )


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _differentiable(dispatch, tile_size, x, weights, needed, active):
    return batched(partial(_compute, dispatch, tile_size))(x, weights, needed, active)


@_differentiable.defjvp
def _tangents(dispatch, tile_size, primals, tangents):
    """Derivatives are the definition's, forward and backward; backward, hidden activations are computed again."""
    x, weights, needed, active = primals

    @jax.checkpoint
    def definition(x, weights):
        return reference.block_sparse_ffn(x, weights, needed, tile_size, active).astype(x.dtype)

    return _differentiable(dispatch, tile_size, *primals), jax.jvp(definition, (x, weights), tangents[:2])[1]


def _compute(dispatch, tile_size, x, weights: FFNWeights, needed, active):
    """x (batch, tokens, d), needed (batch, tiles, B), active (batch, tokens, G) or None."""

    def sparse():
        lists = mask_to_indices(needed.reshape(-1, needed.shape[-1]))
        return dispatch.backend.run(x, weights, lists, active, tile_size).astype(x.dtype)

    def masked():
        return reference.block_sparse_ffn(x, weights, needed, tile_size, active).astype(x.dtype)

    def dense():
        return reference.ffn(x, *weights, active).astype(x.dtype)

    if dispatch.break_even is None:
        return sparse()
    branch = jnp.where(needed.all(), 2, jnp.where(needed.mean() > dispatch.break_even, 1, 0))
    return jax.lax.switch(branch, (sparse, masked, dense))
