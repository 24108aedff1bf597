"""The block-sparse FFN for TPUs, in Pallas.

The weights stay in vector memory for all tiles. A tile goes through its list in chunks of up to 128 neurons: the rows
of the listed blocks are copied together, so that the matrix unit sees full operands whatever the size of a block, and
both products follow at once; hidden activations never leave the core. They are kept transposed, neurons on rows,
because rows can be picked at run time and lanes cannot.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from detr_jax.kernels import routed_tpu
from detr_jax.kernels.backend import Backend, FFNShape, FFNWeights
from detr_jax.kernels.block_masks import BlockLists, pad_tokens
from detr_jax.kernels.reference import expand_groups

CHUNK = 128
"""Neurons whose activations are computed at once: the width of the matrix unit."""
TOKENS = 256
"""Tokens computed at once; larger tiles are divided."""
SCALARS = 1 << 16
"""Entries of the lists that fit into scalar memory beside everything else; more tiles than that take several calls."""
VECTOR_MEMORY = 12 << 20
"""Bytes of weights that may stay in vector memory, of the 16 MiB that the smallest supported TPU gives a kernel."""
LANES = 128


def unsupported_reason(shape: FFNShape) -> str | None:
    """Why this cannot compute an FFN on the default device; None if it can."""
    if jax.default_backend() != "tpu":
        return f"it runs on TPUs, not on {jax.default_backend()}"
    return unsupported(shape)


def unsupported(shape: FFNShape) -> str | None:
    """Why this cannot compute an FFN on any TPU; None if it can."""
    if shape.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it computes in float32 or bfloat16, not in {shape.dtype}"
    rows = 32 // shape.dtype.itemsize  # of a tile of registers
    if shape.block_size % rows:
        return f"blocks of {shape.block_size} neurons are not whole registers of {rows} rows, as {shape.dtype} needs"
    if shape.d_model % LANES:
        return f"{shape.d_model} features are not a multiple of {LANES}"
    size = shape.hidden * (2 * shape.d_model * shape.dtype.itemsize + LANES * 4)
    if size > VECTOR_MEMORY:
        return f"its weights take {size / 2**20:.0f} MiB of vector memory, more than {VECTOR_MEMORY >> 20}"
    return None


def block_sparse_ffn(
    x: jax.Array, weights: FFNWeights, lists: BlockLists, active: jax.Array | None = None, *, interpret: Any = False
) -> jax.Array:
    """The FFN as `backend.KernelFn`; for tests on other devices, `interpret` takes `pltpu.InterpretParams`."""
    tiles, tile_size, d = x.shape
    features, blocks = len(weights.w_in), lists.indices.shape[-1]
    # Whole registers, and no more tokens at once than fit; the parts of a tile share its list.
    parts = -(-tile_size // TOKENS)
    tokens = -(-tile_size // (parts * 16)) * 16

    def divide(array):
        return pad_tokens(array, parts * tokens).reshape(tiles * parts, tokens, array.shape[-1])

    operands = [divide(x)]
    if active is not None:  # neurons on rows, as the activations are
        operands.append(divide(expand_groups(active, features)).swapaxes(1, 2).astype(x.dtype))
    indices, counts = (jnp.repeat(array, parts, axis=0) for array in lists)
    resident = (weights.w_in, weights.b_in[:, None].astype(jnp.float32), weights.w_out, weights.b_out[None])
    run = partial(_call, features // blocks, active is not None, interpret)
    step = max(SCALARS // blocks, 1)
    outputs = [
        run(indices[i : i + step].reshape(-1), counts[i : i + step], *(o[i : i + step] for o in operands), *resident)
        for i in range(0, tiles * parts, step)
    ]
    return jnp.concatenate(outputs).reshape(tiles, parts * tokens, d)[:, :tile_size]


def _call(block_size, exact, interpret, indices, counts, x, *operands):
    """One launch: indices (tiles * B,), counts (tiles,), x (tiles, tokens, d), [active (tiles, F, tokens)], weights."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu  # 0.2 seconds: not where it does not run

    tiles, tokens, d = x.shape
    split = int(exact)
    per_tile = [pl.BlockSpec((1, *array.shape[1:]), lambda i, *_: (i, 0, 0)) for array in (x, *operands[:split])]
    once = pl.Buffered(1)
    resident = [pl.BlockSpec(array.shape, lambda *_: (0, 0), pipeline_mode=once) for array in operands[split:]]
    chunk = max(CHUNK // block_size, 1) * block_size
    rows = [pltpu.VMEM((chunk, d), x.dtype), pltpu.VMEM((chunk, 1), jnp.float32), pltpu.VMEM((chunk, d), x.dtype)]
    mask = [pltpu.VMEM((chunk, tokens), x.dtype)] if exact else []
    return pl.pallas_call(
        partial(_kernel, block_size, exact),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(tiles,),
            in_specs=[*per_tile, *resident],
            out_specs=pl.BlockSpec((1, tokens, d), lambda i, *_: (i, 0, 0)),
            scratch_shapes=[*rows, *mask, pltpu.VMEM((tokens, d), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="block_sparse_ffn",
    )(indices, counts, x, *operands)


def _kernel(block_size, exact, indices, counts, x, *refs):
    from jax.experimental import pallas as pl

    active, refs = (refs[0], refs[1:]) if exact else (None, refs)
    w_in, b_in, w_out, b_out, out, chunk_in, chunk_bias, chunk_out, *chunk_active, total = refs
    tile, blocks = pl.program_id(0), w_in.shape[0] // block_size
    count = counts[tile]
    per_chunk = chunk_in.shape[0] // block_size
    # float32 means float32: the matrix unit would round to bfloat16 otherwise.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    product = partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    def add_chunk(step, _):
        first = step * per_chunk
        for i in range(per_chunk):
            # Behind the end of the list any block will do: it is masked.
            block = indices[tile * blocks + jnp.minimum(first + i, blocks - 1)]
            rows = pl.ds(pl.multiple_of(block * block_size, block_size), block_size)
            place = pl.ds(i * block_size, block_size)
            chunk_in[place], chunk_bias[place], chunk_out[place] = w_in[rows], b_in[rows], w_out[rows]
            if exact:
                chunk_active[0][place] = active[0, rows]
        hidden = product(chunk_in[...], x[0], (((1,), (1,)), ((), ()))) + chunk_bias[...]
        neuron = jax.lax.broadcasted_iota(jnp.int32, hidden.shape, 0)
        kept = neuron < (count - first) * block_size
        if exact:
            kept &= chunk_active[0][...].astype(jnp.float32) > 0
        hidden = jnp.where(kept, jnp.maximum(hidden, 0), 0).astype(x.dtype)
        total[...] += product(hidden, chunk_out[...], (((0,), (0,)), ((), ())))
        return 0

    total[...] = jnp.broadcast_to(b_out[...].astype(jnp.float32), total.shape)
    jax.lax.fori_loop(0, pl.cdiv(count, per_chunk), add_chunk, 0)
    out[0] = total[...].astype(out.dtype)


BACKEND = Backend(
    "mosaic_tpu",
    ("tpu",),
    block_sparse_ffn,
    unsupported_reason,
    break_even=0.7,
    run_routed=routed_tpu.run,
    routed_unsupported_reason=routed_tpu.unsupported_reason,
)
