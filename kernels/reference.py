"""The feed-forward layer, dense or with inactive neuron groups masked: the definition every kernel must match.

Notation (d model features, F hidden neurons, g neurons in a group, G = F / g groups)::

    h = relu(x W_in^T + b_in)        W_in  (F, d), neurons on rows
    y = (h * active) W_out + b_out   W_out (F, d), neurons on rows
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from detr_jax.kernels import experts
from detr_jax.kernels.backend import Backend, FFNWeights, in_tiles
from detr_jax.kernels.block_masks import BlockLists, indices_to_mask, repeat_per_tile


def hidden_activations(
    x: Float[Array, "*batch d"], w_in: Float[Array, "F d"], b_in: Float[Array, " F"]
) -> Float[Array, "*batch F"]:
    """h = relu(x W_in^T + b_in)."""
    return jax.nn.relu(x @ w_in.T + b_in)


def expand_groups(active: Shaped[Array, "*batch G"], neurons: int) -> Shaped[Array, "*batch F"]:
    """Repeats a decision per group to one per neuron, groups of F / G consecutive neurons.

    Raises:
        ValueError: if `neurons` is not a multiple of the number of groups.
    """
    groups = active.shape[-1]
    if neurons % groups:
        raise ValueError(f"{neurons} hidden neurons cannot be divided into {groups} groups of equal size")
    return jnp.repeat(active, neurons // groups, axis=-1)


def ffn(
    x: Float[Array, "*batch d"],
    w_in: Float[Array, "F d"],
    b_in: Float[Array, " F"],
    w_out: Float[Array, "F d"],
    b_out: Float[Array, " d"],
    active: Bool[Array, "*batch G"] | None = None,
) -> Float[Array, "*batch d"]:
    """The FFN with inactive groups left out; `active` None computes all of them."""
    hidden = hidden_activations(x, w_in, b_in)
    if active is not None:
        hidden = jnp.where(expand_groups(active, hidden.shape[-1]), hidden, 0)
    return hidden @ w_out + b_out


def block_sparse_ffn(
    x: Float[Array, "*batch tokens d"],
    weights: FFNWeights,
    needed: Bool[Array, "*batch tiles B"],
    tile_size: int,
    active: Bool[Array, "*batch tokens G"] | None = None,
) -> Float[Array, "*batch tokens d"]:
    """The FFN where every tile of consecutive tokens computes, for all of its tokens, the blocks that it needs.

    Args:
        x: inputs.
        weights: of the FFN.
        needed: blocks of F / B consecutive neurons.
        tile_size: tokens per tile; the last tile may be shorter.
        active: with G a multiple of B: of the blocks that are computed each token gets these groups only (the exact
            mode); None gives it all of them.
    """
    per_token = repeat_per_tile(needed, x.shape[-2], tile_size)
    if active is not None:
        per_token = expand_groups(per_token, active.shape[-1]) & active
    return ffn(x, *weights, per_token)


def _run(x: jax.Array, weights: FFNWeights, lists: BlockLists, active: jax.Array | None) -> jax.Array:
    """The definition as a back end, see `backend.TilesFn`."""
    tiles, tile_size, d = x.shape
    needed = indices_to_mask(lists, lists.indices.shape[-1])
    per_token = None if active is None else active.reshape(tiles * tile_size, -1)
    return block_sparse_ffn(x.reshape(-1, d), weights, needed, tile_size, per_token).reshape(x.shape)


BACKEND = Backend(
    "reference",
    platforms=(),
    run=in_tiles(_run),
    unsupported_reason=lambda shape: None,
    break_even=0.0,
    run_routed=experts.routed_ffn,
)
