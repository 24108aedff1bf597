"""The block-sparse FFN for Hopper GPUs, in Pallas.

A thread block computes one tile of tokens. One of its warpgroups only copies: it goes through the tile's list and brings
the rows of the listed blocks into shared memory, in chunks of 64 neurons and a few chunks ahead. The others compute 64
tokens each and share the chunks: the first product, bias, relu, and the second product, whose sum stays in registers
until the list is done. Hidden activations pass through shared memory only.

Neurons are on rows of both matrices, so that 8 neurons are one row of tiles of the 128-byte swizzle: any block of a
multiple of 8 neurons can be copied on its own, and blocks copied below each other are an operand of the matrix unit.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from detr_jax.kernels.blocks import BlockLists, pad_tokens
from detr_jax.kernels.dispatch import Problem
from detr_jax.kernels.reference import FFNWeights

CHUNK = 64
"""Neurons whose activations are computed at once."""
ROWS = 64
"""Tokens of a warpgroup: the rows of an instruction of the matrix unit."""
TOKENS = 2 * ROWS
"""Tokens of a thread block; larger tiles are divided."""
STAGES = 2
"""Chunks in shared memory at once: one in use, the others on their way."""
MAX_FEATURES = 256
"""Model features whose sums for 64 tokens fit the registers of a warpgroup."""
# 128 bytes of bfloat16, in tiles of 8 rows.
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def refusal(problem: Problem) -> str | None:
    """Why this cannot compute something on the default device; None if it can."""
    if jax.default_backend() != "gpu":
        return f"it runs on Hopper GPUs, not on {jax.default_backend()}"
    capability = getattr(jax.devices()[0], "compute_capability", "unknown")
    if capability != "9.0":
        return f"it runs on Hopper GPUs, of compute capability 9.0, not {capability}"
    return unsupported(problem)


def unsupported(problem: Problem) -> str | None:
    """Why this cannot compute something on any Hopper GPU; None if it can."""
    if problem.dtype != jnp.bfloat16:
        return f"it computes in bfloat16, not in {problem.dtype}"
    if problem.groups is not None:
        return "it gives all tokens of a tile the same neurons: it has no exact mode"
    if problem.d_model % 64:
        return f"{problem.d_model} features are not a multiple of 64"
    if problem.d_model > MAX_FEATURES:
        return f"sums of {problem.d_model} features do not fit its registers, up to {MAX_FEATURES} do"
    if problem.features % CHUNK:
        return f"{problem.features} hidden neurons are not whole chunks of {CHUNK}"
    block_size = problem.features // problem.blocks
    if block_size % CHUNK and block_size not in (8, 16, 32):
        return f"blocks of {block_size} neurons are neither 8, 16 or 32 nor a multiple of {CHUNK}"
    return None


def block_sparse_ffn(
    x: jax.Array,
    weights: FFNWeights,
    lists: BlockLists,
    active: jax.Array | None = None,
    *,
    interpret: "bool | plgpu.InterpretGPUParams" = False,
) -> jax.Array:
    """The FFN of tiles that each compute their own blocks.

    Args:
        x: (tiles, tile tokens, d) bfloat16.
        weights: of the FFN.
        lists: `indices` (tiles, B), rows that are permutations of the blocks; see `blocks.lists_of`.
        active: must be None, see `unsupported`.
        interpret: for tests on other devices; the newest JAX only.

    Returns:
        (tiles, tile tokens, d).
    """
    assert active is None, "there is no exact mode"
    tiles, tile_size, d = x.shape
    features, blocks = len(weights.w_in), lists.indices.shape[-1]
    # The parts of a tile share its list.
    tokens = ROWS if tile_size <= ROWS else TOKENS
    parts = pad_tokens(x, tokens).reshape(-1, tokens, d)
    outputs = _call(features // blocks, interpret, parts, weights, lists)
    return outputs.reshape(tiles, -1, d)[:, :tile_size]


def dense_ffn(
    x: jax.Array, weights: FFNWeights, *, interpret: "bool | plgpu.InterpretGPUParams" = False
) -> jax.Array:
    """The FFN with all of its neurons, by the same kernel without lists: what sparsity has to beat.

    Args:
        x: (tokens, d) bfloat16.
        weights: of the FFN.
        interpret: as for `block_sparse_ffn`.

    Returns:
        (tokens, d).
    """
    tokens, d = x.shape
    parts = pad_tokens(x, TOKENS).reshape(-1, TOKENS, d)
    return _call(CHUNK, interpret, parts, weights).reshape(-1, d)[:tokens]


def _call(block_size, interpret, x, weights, lists=None):
    """One launch: x (parts, tokens, d), lists of (tiles, B) and (tiles,) for as many parts each, or None for all."""
    parts, tokens, d = x.shape
    w_in, b_in, w_out, b_out = weights
    features, groups = len(w_in), tokens // ROWS
    operands = [] if lists is None else [*lists]
    if block_size < CHUNK:
        # A few numbers are too little to copy: the bias of every list is brought into its order beforehand.
        b_in = b_in.reshape(-1, block_size)[lists.indices]
    run = plgpu.kernel(
        partial(_kernel, block_size, features, lists is not None),
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(parts,),
        grid_names=("part",),
        num_threads=groups + 1,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((groups, ROWS, d), x.dtype, transforms=SWIZZLED),
            plgpu.SMEM((groups, d), x.dtype),
            plgpu.SMEM((groups, ROWS, CHUNK), x.dtype, transforms=SWIZZLED),
            plgpu.SMEM((STAGES, CHUNK, d), x.dtype, transforms=SWIZZLED),
            plgpu.SMEM((STAGES, CHUNK), x.dtype),
            plgpu.SMEM((STAGES, CHUNK, d), x.dtype, transforms=SWIZZLED),
            plgpu.Barrier(num_arrivals=2, num_barriers=groups),
            plgpu.Barrier(num_arrivals=2 * max(CHUNK // block_size, 1) + 1, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=groups, num_barriers=STAGES),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    return run(x, w_in, b_in.reshape(-1), w_out, b_out, *operands)


def _kernel(block_size, features, sparse, x, w_in, b_in, w_out, b_out, *refs):
    (indices, counts), refs = (refs[:2], refs[2:]) if sparse else ((None, None), refs)
    out, x_tile, out_bias, hidden, chunk_in, chunk_bias, chunk_out, x_loaded, loaded, used = refs
    part, group = jax.lax.axis_index("part"), jax.lax.axis_index("group")
    groups, _, d = x_tile.shape
    if sparse:
        tile = part // (x.shape[0] // counts.shape[0])
        neurons = counts[tile] * block_size
    else:
        neurons = features
    chunks = pl.cdiv(neurons, CHUNK)

    def copy(chunk):
        """Brings a chunk of the list into its place in shared memory."""
        stage = chunk % STAGES
        arrived = loaded.at[stage]
        size = min(block_size, CHUNK)
        for i in range(CHUNK // size):
            first = chunk * CHUNK + i * size
            if sparse:
                first = indices[tile, first // block_size] * block_size + first % block_size
            rows, place = pl.ds(pl.multiple_of(first, size), size), pl.ds(i * size, size)
            plgpu.copy_gmem_to_smem(w_in.at[rows], chunk_in.at[stage, place], arrived)
            plgpu.copy_gmem_to_smem(w_out.at[rows], chunk_out.at[stage, place], arrived)
        bias = tile * features + chunk * CHUNK if size < CHUNK else first
        plgpu.copy_gmem_to_smem(b_in.at[pl.ds(pl.multiple_of(bias, CHUNK), CHUNK)], chunk_bias.at[stage], arrived)

    @pl.when(group == groups)
    def _():
        if groups == 2:
            plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, chunks)
        def _(chunk):
            @pl.when(chunk >= STAGES)
            def _():
                plgpu.barrier_wait(used.at[chunk % STAGES])

            copy(chunk)

    def compute(total):
        def add_chunk(chunk, _):
            stage = chunk % STAGES
            plgpu.barrier_wait(loaded.at[stage])

            def first_product(sums):
                plgpu.wgmma(sums, x_tile.at[group], transposed(chunk_in.at[stage]))
                return sums[...]

            h = pl.run_scoped(first_product, plgpu.ACC((ROWS, CHUNK), jnp.float32))
            h = jnp.maximum(h + along_columns(chunk_bias[stage], h.shape), 0)
            if block_size < CHUNK:
                neuron = plgpu.broadcasted_iota(jnp.int32, h.shape, 1, layout=plgpu.Layout.WGMMA)
                h = jnp.where(neuron < neurons - chunk * CHUNK, h, 0)
            hidden[group] = h.astype(hidden.dtype)
            plgpu.commit_smem()
            plgpu.wgmma(total, hidden.at[group], chunk_out.at[stage])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(used.at[stage])
            return None

        jax.lax.fori_loop(0, chunks, add_chunk, None)
        return total[...]

    @pl.when(group < groups)
    def _():
        if groups == 2:
            plgpu.set_max_registers(232, action="increase")
        rows = pl.ds(group * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(x.at[part, rows], x_tile.at[group], x_loaded.at[group])
        plgpu.copy_gmem_to_smem(b_out, out_bias.at[group], x_loaded.at[group])
        plgpu.barrier_wait(x_loaded.at[group])
        y = pl.run_scoped(compute, plgpu.ACC((ROWS, d), jnp.float32))
        x_tile[group] = (y + along_columns(out_bias[group], y.shape)).astype(x_tile.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x_tile.at[group], out.at[part, rows])
        plgpu.wait_smem_to_gmem(0)


def along_columns(row, shape):
    """A row of numbers for every row of an accumulator, in float32."""
    row = plgpu.layout_cast(row, plgpu.Layout.WGMMA.reduce(0)).astype(jnp.float32)
    return jax.lax.broadcast_in_dim(row, shape, [1])


def transposed(ref):
    """A matrix in shared memory seen as its transpose: a method since JAX 0.11, a function before."""
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))
