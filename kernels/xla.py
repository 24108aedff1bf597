"""The block-sparse FFN in XLA: gathers what belongs together and multiplies densely.

Tiles come one after the other, and the blocks that a tile needs are gathered. Shapes are static, so a tile computes one
of a few capacities, the least that holds its blocks; `jax.lax.switch` chooses at run time and nothing recompiles with
the data. Tiles much smaller than a block are fewer numbers than its weights: then the blocks come one after the other,
and the tiles that need a block are gathered, some at a time.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from detr_jax.kernels import routed_xla
from detr_jax.kernels.backend import Backend, FFNWeights, in_tiles
from detr_jax.kernels.block_masks import BlockLists, indices_to_mask, mask_to_indices
from detr_jax.kernels.reference import expand_groups, ffn

SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
"""Capacities, as shares of all blocks. A tile that needs more is computed without a gather."""
SMALL = 1 / 2
"""Of a block's neurons: tiles of up to so many tokens are gathered, not the blocks. Measured on a CPU."""
GATHERED_TOKENS = 64
"""Tokens for which a block is computed at once where tiles are gathered."""


def capacities(blocks: int) -> tuple[int, ...]:
    """Numbers of blocks that tiles compute, ascending, less than all."""
    return tuple(sorted({math.ceil(share * blocks) for share in SHARES} - {blocks}))


def _run(x: jax.Array, weights: FFNWeights, lists: BlockLists, active: jax.Array | None) -> jax.Array:
    small = x.shape[1] <= SMALL * len(weights.w_in) / lists.indices.shape[-1]
    return (_block_by_block if small and x.shape[0] != 1 else _tile_by_tile)(x, weights, lists, active)


def _tile_by_tile(x, weights: FFNWeights, lists, active):
    """Branches compute one tile: x (tile tokens, d), indices (B,), count (), active (tile tokens, G) or None."""
    blocks = lists.indices.shape[-1]
    by_block = _by_block(weights, blocks)

    def nothing(x, indices, count, active):
        return jnp.broadcast_to(weights.b_out, x.shape)

    def gathered(capacity, x, indices, count, active):
        """The first `capacity` blocks of the list, of which `count` are needed."""
        listed = indices[:capacity]
        kept = jnp.broadcast_to(jnp.arange(capacity) < count, (len(x), capacity))
        if active is not None:
            kept = (active.reshape(len(x), blocks, -1)[:, listed] & kept[..., None]).reshape(len(x), -1)
        w_in, b_in, w_out = (array[listed].reshape(-1, *array.shape[2:]) for array in by_block)
        return ffn(x, w_in, b_in, w_out, weights.b_out, kept)

    def masked(x, indices, count, active):
        kept = jnp.broadcast_to(jnp.zeros(blocks, bool).at[indices].set(jnp.arange(blocks) < count), (len(x), blocks))
        return ffn(x, *weights, kept if active is None else expand_groups(kept, active.shape[-1]) & active)

    def everything(x, indices, count, active):
        return ffn(x, *weights, active)

    sizes = capacities(blocks)
    least = jnp.array((0, *sizes, blocks - 1))  # of each branch the most blocks that it can compute
    branches: list = [nothing, *(partial(gathered, capacity) for capacity in sizes), masked, everything]
    branches = [lambda *tile, branch=branch: branch(*tile).astype(x.dtype) for branch in branches]
    return jax.lax.map(
        lambda tile: jax.lax.switch(jnp.searchsorted(least, tile[2]), branches, *tile), (x, *lists, active)
    )


def _by_block(weights, blocks):
    """W_in (B, F / B, d), b_in (B, F / B) and W_out (B, F / B, d)."""
    return [array.reshape(blocks, -1, *array.shape[1:]) for array in weights[:3]]


def _block_by_block(x, weights, lists, active):
    tiles, tile_size, _ = x.shape
    blocks = lists.indices.shape[-1]
    together = max(GATHERED_TOKENS // tile_size, 1)
    if isinstance(tiles, int):  # not a symbol of `jax.export`
        together = min(together, tiles)
    needing = mask_to_indices(indices_to_mask(lists, blocks).T)  # of each block, the tiles
    steps = -(-needing.counts // together)
    ends = jnp.cumsum(steps)
    by_block = _by_block(weights, blocks)
    no_bias = jnp.zeros_like(weights.b_out)

    def add(step, total):
        block = jnp.searchsorted(ends, step, side="right")
        first = (step - (ends[block] - steps[block])) * together
        places = first + jnp.arange(together)
        listed = needing.indices.at[block, places].get(mode="clip")
        kept = jnp.broadcast_to((places < needing.counts[block])[:, None, None], (together, tile_size, 1))
        if active is not None:
            kept &= active.reshape(tiles, tile_size, blocks, -1)[listed, :, block]
        w_in, b_in, w_out = (array[block] for array in by_block)
        part = ffn(x[listed], w_in, b_in, w_out, no_bias, kept)
        return total.at[listed].add(part.astype(total.dtype))

    total = jnp.broadcast_to(weights.b_out.astype(jnp.float32), x.shape)
    return jax.lax.fori_loop(0, ends[-1], add, total).astype(x.dtype)


BACKEND = Backend(
    "xla",
    platforms=("cpu",),
    run=in_tiles(_run),
    unsupported_reason=lambda shape: None,
    break_even=0.75,
    run_routed=routed_xla.run,
    routed_rows=routed_xla.rows_computed,
)
