"""The block-sparse FFN for TPUs, in Pallas.

The weights stay in vector memory for all tiles, of which each grid step takes several. A tile goes through its list in
chunks of up to 128 neurons: the rows of the listed blocks are copied together, so that the matrix unit sees full
operands whatever the size of a block, and both products follow at once; hidden activations never leave the core. Blocks
that are a chunk by themselves are not copied.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from detr_jax.kernels import routed_tpu
from detr_jax.kernels.backend import Backend, FFNShape, FFNWeights, in_tiles
from detr_jax.kernels.block_masks import BlockLists, pad_tokens
from detr_jax.kernels.reference import expand_groups
from detr_jax.kernels.tpu import LANES, absent

CHUNK = 128
"""Neurons whose activations are computed at once: the width of the matrix unit."""
TOKENS = 256
"""Tokens computed at once; larger tiles are divided."""
STEP = 2 << 20
"""Bytes of inputs and outputs of a grid step, unless one tile has more: what hides the latency of a copy."""
SCALARS = 1 << 15
"""Entries of the lists of a grid step in scalar memory, which has 1 MiB and holds those of the next step, too."""
VECTOR_MEMORY = 12 << 20
"""Bytes of weights that may stay in vector memory, of the 16 MiB that the smallest supported TPU gives a kernel."""


def unsupported_reason(shape: FFNShape) -> str | None:
    """Why this cannot compute an FFN on the default device; None if it can."""
    return absent() or unsupported(shape)


def unsupported(shape: FFNShape) -> str | None:
    """Why this cannot compute an FFN on any TPU; None if it can."""
    if shape.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it computes in float32 or bfloat16, not in {shape.dtype}"
    rows = 32 // shape.dtype.itemsize  # of a tile of registers
    if shape.block_size % rows:
        return f"blocks of {shape.block_size} neurons are not whole registers of {rows} rows, as {shape.dtype} needs"
    if shape.d_model % LANES:
        return f"{shape.d_model} features are not a multiple of {LANES}"
    biases = shape.hidden // shape.block_size * max(CHUNK, shape.block_size)
    size = 2 * shape.hidden * shape.d_model * shape.dtype.itemsize + 4 * biases
    if size > VECTOR_MEMORY:
        return f"its weights take {size / 2**20:.0f} MiB of vector memory, more than {VECTOR_MEMORY >> 20}"
    return None


def block_sparse_ffn(
    x: jax.Array, weights: FFNWeights, lists: BlockLists, active: jax.Array | None = None, *, interpret: Any = False
) -> jax.Array:
    """The FFN as `backend.TilesFn`; for tests on other devices, `interpret` takes `pltpu.InterpretParams`."""
    tiles, tile_size, d = x.shape
    features, blocks = len(weights.w_in), lists.indices.shape[-1]
    # Whole registers, and no more tokens at once than fit; the parts of a tile share its list.
    parts = -(-tile_size // TOKENS)
    tokens = -(-tile_size // (parts * 16)) * 16

    def divide(array):
        return pad_tokens(array, parts * tokens).reshape(tiles * parts, tokens, array.shape[-1])

    operands = [divide(x)]
    if active is not None:  # neurons on rows, which can be picked at run time; columns cannot
        operands.append(divide(expand_groups(active, features)).swapaxes(1, 2).astype(x.dtype))
    # The biases of a block at every place that it may have in a chunk.
    b_in = jnp.tile(weights.b_in.astype(jnp.float32).reshape(blocks, -1), _per_chunk(features // blocks))
    resident = (weights.w_in, b_in, weights.w_out, weights.b_out[None].astype(jnp.float32))
    mask = 0 if active is None else features * -(-tokens // LANES) * LANES
    size = 2 * x.dtype.itemsize * (2 * tokens * d + mask)  # twice: the next step's inputs, the last one's outputs
    step = max(min(STEP // size, SCALARS // blocks, tiles * parts), 1)
    indices, counts = (_by_step(jnp.repeat(array, parts, axis=0), step) for array in lists)
    outputs = _call(indices, counts, operands, resident, interpret)
    return outputs.reshape(tiles, parts * tokens, d)[:, :tile_size]


def _per_chunk(block_size: int) -> int:
    return max(CHUNK // block_size, 1)


def _by_step(array: jax.Array, step: int) -> jax.Array:
    """(tiles, ...) -> (steps, 1, n), with zeros for tiles that are not there."""
    padding = [(0, -len(array) % step), *[(0, 0)] * (array.ndim - 1)]
    return jnp.pad(array, padding).reshape(-(-len(array) // step), 1, -1)


def _call(indices, counts, operands, resident, interpret):
    """Launch on [x (tiles, tokens, d), active (tiles, F, tokens) if exact], and lists (steps, 1, entries of a step)."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu  # 0.2 seconds: not where it does not run

    x, exact = operands[0], len(operands) == 2
    (_, tokens, d), (blocks, chunk), step = x.shape, resident[1].shape, counts.shape[2]
    lists = [pl.BlockSpec((1, 1, a.shape[2]), lambda i: (i, 0, 0), memory_space=pltpu.SMEM) for a in (indices, counts)]
    several = [pl.BlockSpec((step, *array.shape[1:]), lambda i: (i, 0, 0)) for array in operands]
    once = [pl.BlockSpec(array.shape, lambda i: (0, 0), pipeline_mode=pl.Buffered(1)) for array in resident]
    copied = len(resident[0]) // blocks < chunk
    scratch = [
        pltpu.VMEM((tokens, d), jnp.float32),
        *([pltpu.VMEM((chunk, d), x.dtype)] * 2 if copied else []),
        *([pltpu.VMEM((chunk, tokens), x.dtype)] if exact else []),
    ]
    return pl.pallas_call(
        partial(_kernel, exact, copied),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type),
        grid=(len(counts),),
        in_specs=[*lists, *several, *once],
        out_specs=several[0],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="block_sparse_ffn",
    )(indices, counts, *operands, *resident)


def _kernel(exact, copied, indices, counts, x, *refs):
    from jax.experimental import pallas as pl

    active, refs = (refs[0], refs[1:]) if exact else (None, refs)
    w_in, b_in, w_out, b_out, out, total, *refs = refs
    chunk_in, chunk_out, *chunk_active = refs if copied else (None, None, *refs)
    blocks, chunk = b_in.shape
    block_size = w_in.shape[0] // blocks
    per_chunk = _per_chunk(block_size)
    # float32 means float32: the matrix unit would round to bfloat16 otherwise.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    product = partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    neuron = jax.lax.broadcasted_iota(jnp.int32, (1, chunk), 1)

    @pl.loop(0, x.shape[0])
    def _(tile):
        count = counts[0, 0, tile]
        total[...] = jnp.broadcast_to(b_out[...], total.shape)

        @pl.loop(0, pl.cdiv(count, per_chunk))
        def _(step):
            first = step * per_chunk
            bias = jnp.zeros((1, chunk), jnp.float32)
            for i in range(per_chunk):
                # Behind the end of the list any block will do: it is masked.
                block = indices[0, 0, tile * blocks + jnp.minimum(first + i, blocks - 1)]
                rows = pl.ds(pl.multiple_of(block * block_size, block_size), block_size)
                place = pl.ds(i * block_size, block_size)
                bias = jnp.where(neuron >= i * block_size, b_in[pl.ds(block, 1)], bias)
                if copied:
                    chunk_in[place], chunk_out[place] = w_in[rows], w_out[rows]
                if exact:
                    chunk_active[0][place] = active[tile, rows]
            rows_in, rows_out = (chunk_in[...], chunk_out[...]) if copied else (w_in[rows], w_out[rows])
            hidden = product(x[tile], rows_in, (((1,), (1,)), ((), ()))) + bias
            kept = neuron < (count - first) * block_size
            if exact:
                kept &= chunk_active[0][...].astype(jnp.float32).T > 0
            hidden = jnp.where(kept, jnp.maximum(hidden, 0), 0).astype(x.dtype)
            total[...] += product(hidden, rows_out, (((1,), (0,)), ((), ())))

        out[tile] = total[...].astype(out.dtype)


BACKEND = Backend(
    "mosaic_tpu",
    ("tpu",),
    in_tiles(block_sparse_ffn),
    unsupported_reason,
    break_even=0.7,
    run_routed=routed_tpu.run,
    routed_rows=lambda counts, tokens: -(-counts // routed_tpu.TILE) * routed_tpu.TILE,
    routed_unsupported_reason=routed_tpu.unsupported_reason,
)
