"""The block-sparse FFN for Hopper GPUs, in Pallas.

A thread block computes one tile of up to 128 tokens, each of its warpgroups 64 of them. They go through the tile's list
in chunks of 64 neurons, which they share: the rows of the listed blocks are copied into shared memory two chunks ahead
while both products of a chunk follow each other. Hidden activations pass through shared memory only, the sums of the
second product stay in registers until the list is done.

Neurons are on rows of both matrices, and 8 rows are one row of tiles of the 128-byte swizzle: a block of as few as 8
neurons can be copied on its own, and blocks copied below each other are an operand of the matrix unit.

No warpgroup is set aside for copying: see `hopper`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from detr_jax.kernels import hopper, routed_gpu
from detr_jax.kernels.backend import Backend, FFNShape, FFNWeights, in_tiles
from detr_jax.kernels.block_masks import BlockLists, pad_tokens
from detr_jax.kernels.reference import expand_groups

CHUNK = 64
"""Neurons whose activations are computed at once."""
ROWS = 64
"""Tokens of a warpgroup: the rows of an instruction of the matrix unit."""
TOKENS = 2 * ROWS
"""Tokens of a thread block; larger tiles are divided."""
WORD = 32
"""Neurons of a word of the mask of the exact mode."""
STAGES = 2
"""Chunks in shared memory at once: one in use, the next on its way."""


def unsupported_reason(shape: FFNShape) -> str | None:
    """Why this cannot compute an FFN on the default device; None if it can."""
    return hopper.unsupported_device() or unsupported(shape)


def unsupported(shape: FFNShape) -> str | None:
    """Why this cannot compute an FFN on any Hopper GPU; None if it can."""
    if reason := hopper.unsupported_inputs(shape.dtype, shape.d_model):
        return reason
    if shape.hidden % CHUNK:
        return f"{shape.hidden} hidden neurons are not whole chunks of {CHUNK}"
    if shape.block_size % CHUNK and shape.block_size not in (8, 16, 32):
        return f"blocks of {shape.block_size} neurons are neither 8, 16 or 32 nor a multiple of {CHUNK}"
    return None


def block_sparse_ffn(
    x: jax.Array,
    weights: FFNWeights,
    lists: BlockLists | None,
    active: jax.Array | None = None,
    tile_size: int | None = None,
    *,
    interpret: Any = False,
) -> jax.Array:
    """The FFN as `backend.KernelFn` in bfloat16, in one launch.

    Args:
        x: (images, tokens, d) bfloat16.
        weights: of the FFN.
        lists: the blocks of each tile; None for all neurons, the dense FFN that sparsity has to beat.
        active: groups of each token.
        tile_size: tokens per tile; None for all of an image.
        interpret: for tests on other devices, the `InterpretGPUParams` of the newest JAX.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu  # half a second: not where it does not run

    swizzled = hopper.swizzle()
    images, image_tokens, d = x.shape
    tile_size = min(tile_size or image_tokens, image_tokens)
    tokens = ROWS if tile_size <= ROWS else TOKENS
    if tile_size < image_tokens and (tile_size % tokens or active is not None):
        # Parts of a tile would reach into the next one, or the mask depends on the tile: each tile is an image.
        return in_tiles(partial(block_sparse_ffn, interpret=interpret))(x, weights, lists, active, tile_size)
    # The parts of a tile share its list.
    tiles, parts = -(-image_tokens // tile_size), -(-tile_size // tokens)
    # Copies are clipped to the tokens of an image, if these are whole tiles of the layout.
    x = pad_tokens(x, hopper.LAYOUT_ROWS)
    features, groups = len(weights.w_in), tokens // ROWS
    block_size = CHUNK if lists is None else features // lists.indices.shape[-1]
    copies = max(CHUNK // block_size, 1)
    b_in = weights.b_in
    if block_size < CHUNK:
        # Fewer numbers than can be copied at once: the biases are brought into the order of each list beforehand.
        b_in = b_in.reshape(-1, block_size)[lists.indices].reshape(-1)
    operands = [x, weights.w_in, b_in, weights.w_out, weights.b_out, *(lists or ())]
    if active is not None:
        # The neurons that each token gets, in the order in which its tile lists their blocks; none behind the list.
        blocks = lists.indices.shape[-1]
        by_block = active.reshape(images, image_tokens, blocks, -1)
        listed = jnp.take_along_axis(by_block, lists.indices[:, None, :, None], axis=2)
        listed &= (jnp.arange(blocks) < lists.counts[:, None])[:, None, :, None]
        listed = listed.reshape(active.shape)
        operands.append(_words(pad_tokens(expand_groups(listed, features), hopper.LAYOUT_ROWS)))
    mask_types = [
        plgpu.SMEM((groups, CHUNK // WORD, ROWS), jnp.uint32),
        plgpu.Barrier(num_arrivals=1, num_barriers=groups),
    ]
    run = plgpu.kernel(
        partial(_kernel, block_size, features, tiles, parts, lists is not None, active is not None),
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type),
        grid=(images * tiles * parts,),
        grid_names=("part",),
        num_threads=groups,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((groups, ROWS, d), x.dtype, transforms=swizzled),  # tokens, in the end their outputs
            plgpu.SMEM((groups, d), x.dtype),  # b_out
            plgpu.SMEM((groups, ROWS, CHUNK), x.dtype, transforms=swizzled),  # hidden activations
            plgpu.SMEM((STAGES, CHUNK, d), x.dtype, transforms=swizzled),  # rows of w_in
            plgpu.SMEM((STAGES, CHUNK), x.dtype),  # b_in
            plgpu.SMEM((STAGES, CHUNK, d), x.dtype, transforms=swizzled),  # rows of w_out
            # What has arrived: tokens and b_out, w_in and b_in, w_out.
            plgpu.Barrier(num_arrivals=2, num_barriers=groups),
            plgpu.Barrier(num_arrivals=copies + 1, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
            # What all warpgroups have used: w_in and b_in, w_out.
            plgpu.Barrier(num_arrivals=groups, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=groups, num_barriers=STAGES),
            # Bits of the mask, and that they have arrived.
            *([] if active is None else mask_types),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    return run(*operands)[:, :image_tokens]


def _kernel(block_size, features, tiles, parts, sparse, exact, x, w_in, b_in, w_out, b_out, *refs):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    (indices, counts), refs = (refs[:2], refs[2:]) if sparse else ((None, None), refs)
    mask, refs = (refs[0], refs[1:]) if exact else (None, refs)
    out, x_rows, out_bias, hidden, chunk_in, chunk_bias, chunk_out, *barriers = refs
    x_loaded, in_loaded, out_loaded, in_used, out_used, *of_mask = barriers
    chunk_mask, mask_loaded = of_mask or (None, None)
    part, group = jax.lax.axis_index("part"), jax.lax.axis_index("group")
    tile = part // parts
    neurons = counts[tile] * block_size if sparse else features
    chunks = pl.cdiv(neurons, CHUNK)
    size = min(block_size, CHUNK)
    copies = CHUNK // size

    def first_neuron(chunk, i=0):
        """Where the rows of the i-th copy of a chunk begin."""
        first = chunk * CHUNK
        if sparse and block_size <= CHUNK:
            first = indices[tile, chunk * copies + i] * block_size
        elif sparse:
            chunks_of_block = block_size // CHUNK
            first = indices[tile, chunk // chunks_of_block] * block_size + chunk % chunks_of_block * CHUNK
        return pl.multiple_of(first, size)

    def copy_rows(chunk, matrix, destination, loaded):
        for i in range(copies):
            source, place = pl.ds(first_neuron(chunk, i), size), pl.ds(i * size, size)
            plgpu.copy_gmem_to_smem(matrix.at[source], destination.at[chunk % STAGES, place], loaded)

    def copy_in(chunk):
        loaded = in_loaded.at[chunk % STAGES]
        copy_rows(chunk, w_in, chunk_in, loaded)
        first = tile * features + chunk * CHUNK if size < CHUNK else first_neuron(chunk)
        bias = b_in.at[pl.ds(pl.multiple_of(first, CHUNK), CHUNK)]
        plgpu.copy_gmem_to_smem(bias, chunk_bias.at[chunk % STAGES], loaded)

    def copy_out(chunk):
        copy_rows(chunk, w_out, chunk_out, out_loaded.at[chunk % STAGES])

    def replace(chunk, used, copy):
        """Once all warpgroups have used a chunk, its place is given to the next that belongs there."""

        @pl.when((group == 0) & (chunk >= 0) & (chunk + STAGES < chunks))
        def _():
            plgpu.barrier_wait(used.at[chunk % STAGES])
            copy(chunk + STAGES)

    @pl.when(group == 0)
    def _():
        @pl.loop(0, jnp.minimum(STAGES, chunks))
        def _(chunk):
            copy_in(chunk)
            copy_out(chunk)

    image, place = part // (tiles * parts), part % (tiles * parts) * x_rows.shape[0] + group
    rows = pl.ds(pl.multiple_of(place * ROWS, ROWS), ROWS)
    plgpu.copy_gmem_to_smem(x.at[image, rows], x_rows.at[group], x_loaded.at[group])
    plgpu.copy_gmem_to_smem(b_out, out_bias.at[group], x_loaded.at[group])
    plgpu.barrier_wait(x_loaded.at[group])

    def add_chunks(total):
        def add_chunk(chunk, _):
            stage = chunk % STAGES
            if exact:
                words = pl.ds(chunk * (CHUNK // WORD), CHUNK // WORD)
                plgpu.copy_gmem_to_smem(mask.at[image, words, rows], chunk_mask.at[group], mask_loaded.at[group])

            def first_product(sums):
                plgpu.barrier_wait(in_loaded.at[stage])
                plgpu.wgmma(sums, x_rows.at[group], hopper.transposed(chunk_in.at[stage]))
                replace(chunk - 1, out_used, copy_out)  # while it is computed
                return sums[...]

            h = pl.run_scoped(first_product, plgpu.ACC((ROWS, CHUNK), jnp.float32))
            h = jnp.maximum(h + hopper.along_rows(chunk_bias[stage], h.shape), 0)
            neuron = plgpu.broadcasted_iota(jnp.int32, h.shape, 1, layout=plgpu.Layout.WGMMA)
            if exact:
                plgpu.barrier_wait(mask_loaded.at[group])
                first, second = (hopper.along_columns(chunk_mask[group, i], h.shape) for i in range(2))
                word = jnp.where(neuron < WORD, first, second)
                h = jnp.where((word >> (neuron & (WORD - 1)).astype(jnp.uint32)) & 1 > 0, h, 0)
            elif size < CHUNK:
                h = jnp.where(neuron < neurons - chunk * CHUNK, h, 0)
            hidden[group] = h.astype(hidden.dtype)
            plgpu.commit_smem()
            # Only now: the bias, too, must have been read before a copy may overwrite it.
            plgpu.barrier_arrive(in_used.at[stage])
            plgpu.barrier_wait(out_loaded.at[stage])
            plgpu.wgmma(total, hidden.at[group], chunk_out.at[stage])
            replace(chunk, in_used, copy_in)  # while it is computed
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(out_used.at[stage])

        jax.lax.fori_loop(0, chunks, add_chunk, None)
        return total[...]

    y = pl.run_scoped(add_chunks, plgpu.ACC(x_rows.shape[1:], jnp.float32))
    x_rows[group] = (y + hopper.along_rows(out_bias[group], y.shape)).astype(x_rows.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(x_rows.at[group], out.at[image, rows])
    plgpu.wait_smem_to_gmem(0)


def _words(bits: jax.Array) -> jax.Array:
    """(images, tokens, F) bool -> (images, F / WORD, tokens) words, of which the lowest bit is the first neuron."""
    split = bits.reshape(*bits.shape[:-1], -1, WORD).astype(jnp.uint32)
    return (split << jnp.arange(WORD, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32).mT


BACKEND = Backend(
    "mosaic_gpu",
    ("gpu",),
    block_sparse_ffn,
    unsupported_reason,
    break_even=0.6,
    run_routed=routed_gpu.run,
    routed_rows=routed_gpu.rows_computed,
    routed_unsupported_reason=routed_gpu.unsupported_reason,
)
