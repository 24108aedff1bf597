"""Blocks of hidden neurons that each tile of tokens needs: as a mask, and as a list for each tile."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


class BlockLists(NamedTuple):
    """The blocks that each tile needs.

    Attributes:
        indices: (..., tiles, B) int32, the blocks that a tile needs in front. What follows is not needed.
        counts: (..., tiles) int32, how many those are.
    """

    indices: Int[Array, "*batch tiles B"]
    counts: Int[Array, "*batch tiles"]


def mask_to_indices(needed: Bool[Array, "*batch tiles B"]) -> BlockLists:
    """Lists whose rows are permutations of the B blocks, needed ones first and ascending.

    All entries are valid blocks, also those behind the needed ones, so that nothing reads out of range.
    """
    order = jnp.argsort(~needed, axis=-1, stable=True)
    return BlockLists(order.astype(jnp.int32), needed.sum(-1, dtype=jnp.int32))


def indices_to_mask(lists: BlockLists, blocks: int) -> Bool[Array, "*batch tiles B"]:
    """A mask of lists of any capacity, in any order and with repetitions; entries that name no block are ignored."""
    listed = jnp.arange(lists.indices.shape[-1]) < lists.counts[..., None]
    inside = (lists.indices >= 0) & (lists.indices < blocks)
    named = jnp.where(listed & inside, lists.indices, blocks)
    flat = named.reshape(-1, named.shape[-1])
    tile = jnp.arange(flat.shape[0])[:, None]  # `len` takes no symbols of `jax.export`
    needed = jnp.zeros((flat.shape[0], blocks), bool).at[tile, flat].set(True, mode="drop")
    return needed.reshape(*named.shape[:-1], blocks)


def any_per_tile(active: Bool[Array, "*batch tokens G"], tile_size: int, blocks: int) -> Bool[Array, "*batch tiles B"]:
    """The union of active groups over the tokens of a tile and the groups of a block.

    Args:
        active: (..., tokens, G) bool, the groups of F / G neurons that each token needs.
        tile_size: consecutive tokens per tile; the last tile may be shorter.
        blocks: B, of F / B neurons each.

    Raises:
        ValueError: if a block would not consist of whole groups.
    """
    *batch, _, groups = active.shape
    if groups % blocks:
        raise ValueError(f"{groups} groups of neurons cannot be united into {blocks} blocks of equal size")
    padded = pad_tokens(active, tile_size)
    tiles = padded.shape[-2] // tile_size
    return padded.reshape(*batch, tiles, tile_size, blocks, groups // blocks).any((-3, -1))


def repeat_per_tile(
    decisions: Shaped[Array, "*batch tiles n"], tokens: int, tile_size: int | None
) -> Shaped[Array, "*batch tokens n"]:
    """The decisions of each token's tile; a tile size of None is one tile for all."""
    return jnp.repeat(decisions, tile_size or tokens, axis=-2)[..., :tokens, :]


def pad_tokens(array: Shaped[Array, "*batch tokens n"], tile_size: int) -> Shaped[Array, "*batch padded n"]:
    """Appends zeros until tiles of `tile_size` tokens fill it."""
    padding = [(0, 0)] * array.ndim
    padding[-2] = (0, -array.shape[-2] % tile_size)
    return jnp.pad(array, padding)
