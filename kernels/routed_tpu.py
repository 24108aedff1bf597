"""Narrow experts for TPUs, in Pallas.

The weights stay in vector memory. A grid step takes a window of consecutive tokens and goes through tiles of tokens of
one expert: their rows are copied together, both products follow in chunks of neurons, and the outputs are copied back
to where the tokens were. Rows of the next and of the previous tile are copied during the products, which leave the
units that copy idle. Neither sorted inputs nor hidden activations reach the main memory, and XLA gathers no rows: for
bfloat16 its gather alone takes about as many bundles as this kernel.

Single rows can be addressed only if their elements have 32 bits. bfloat16 is therefore kept as words, column i in the
lower half and column i + d / 2 in the upper, or as float32 where half a row is not whole registers.

Numbers of tokens and neurons are read at run time, so that nothing recompiles with the data, and a window has room for
its tokens however they are divided among experts.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.kernels.backend import ExpertsShape
from detr_jax.kernels.experts import Experts, group_tokens, join_rows
from detr_jax.kernels.tpu import LANES, SMALLEST_MEMORY, absent, vector_memory

CHUNK = 128
"""Neurons whose activations are computed at once. Experts are padded to whole chunks with rows of zeros."""
TILE = 64
"""Tokens of one expert that are computed at once. Larger tiles take fewer bundles a row and are less full."""
WINDOW = 8192
"""Tokens of a window at most. In larger windows fewer tiles are partly empty."""
RESERVE = 2 << 20
"""Bytes of vector memory left to the compiler."""


def unsupported_reason(shape: ExpertsShape) -> str | None:
    """Why this cannot compute some experts on the default device; None if it can."""
    return absent() or unsupported(shape, vector_memory())


def unsupported(shape: ExpertsShape, memory: int = SMALLEST_MEMORY) -> str | None:
    """Why this cannot compute some experts on a TPU with so many bytes of vector memory; None if it can."""
    if shape.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it computes in float32 or bfloat16, not in {shape.dtype}"
    if shape.d_model % LANES:
        return f"{shape.d_model} features are not a multiple of {LANES}"
    if not isinstance(shape.tokens, int):
        return "it needs a number of tokens, not a symbol"
    if not _window(shape, memory):
        size = _resident_bytes(shape)
        return f"its experts take {size / 2**20:.0f} of {memory / 2**20:.0f} MiB of vector memory, too many"
    return None


def run(
    x: jax.Array, experts: Experts, assignment: jax.Array, *, memory: int | None = None, interpret: Any = False
) -> jax.Array:
    """Narrow experts as `backend.RoutedFn`.

    Args:
        x: (T, d).
        experts: of the same type.
        assignment: (T,).
        memory: bytes of vector memory; None for those of the default device, or of the smallest if it is no TPU.
        interpret: takes `pltpu.InterpretParams`, for tests on other devices.
    """
    tokens, d = x.shape
    shape = ExpertsShape(x.dtype, tokens, d, experts.widths)
    window = _window(shape, memory or vector_memory())
    count, windows = len(experts.b_out), -(-tokens // window)
    # Tokens of no expert, and places behind the last token, are a group of their own without neurons.
    ids = jnp.pad(assignment, (0, windows * window - tokens), constant_values=count)
    lists = jax.vmap(partial(_tiles, experts=count))(ids.reshape(windows, window))
    chunks = np.cumsum([0, *(_padded(width) // CHUNK for width in experts.widths), 0], dtype=np.int32)
    limit = _resident_bytes(shape) + _window_bytes(shape, window) + RESERVE
    return _call(jnp.asarray(chunks), lists, x, _resident(experts), limit, interpret)


def _tiles(ids: jax.Array, experts: int) -> tuple[jax.Array, ...]:
    """Lists of a window, each (1, n): tokens in the order of groups, group and first entry of each tile, their number.

    Tiles reach behind their group, and there behind the last token, where the last one is repeated.
    """
    order, ends = group_tokens(ids, experts)
    ends = jnp.append(ends, ids.shape[0])
    starts = jnp.pad(ends, (1, 0))[:-1]
    last_tiles = jnp.cumsum(-(-(ends - starts) // TILE), dtype=jnp.int32)
    tile = jnp.arange(ids.shape[0] // TILE + experts + 2, dtype=jnp.int32)
    group = jnp.minimum((tile[:, None] >= last_tiles).sum(1, dtype=jnp.int32), experts)
    first = starts[group] + (tile - jnp.pad(last_tiles, (1, 0))[group]) * TILE
    # The tile behind the last one is fetched, too.
    first = jnp.where(tile < last_tiles[-1], first, ids.shape[0])
    return jnp.pad(order, (0, TILE), mode="edge")[None], group[None], first[None], last_tiles[-1:][None]


def _resident(experts: Experts) -> tuple[jax.Array, ...]:
    """W_in (F', d), b_in (F' / CHUNK, CHUNK), W_out (F', d), b_out (C + 1, d): whole chunks, and one group more."""

    def rows(stacks):
        joined = join_rows(stacks, CHUNK)
        return joined if len(joined) else jnp.zeros((CHUNK, *joined.shape[1:]), joined.dtype)  # all of width 0

    b_in = rows(experts.b_in).reshape(-1, CHUNK).astype(jnp.float32)
    b_out = jnp.pad(experts.b_out.astype(jnp.float32), ((0, 1), (0, 0)))
    return rows(experts.w_in), b_in, rows(experts.w_out), b_out


def _call(chunks, lists, x, resident, limit, interpret):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu  # 0.2 seconds: not where it does not run

    d, window = x.shape[1], lists[0].shape[2] - TILE
    columns = _word_columns(d, x.dtype)
    word = jnp.float32 if columns == d else jnp.uint32
    own = [pl.BlockSpec((1, 1, a.shape[2]), lambda i, *_: (i, 0, 0), memory_space=pltpu.SMEM) for a in lists]
    tokens = pl.BlockSpec((window, d), lambda i, *_: (i, 0))
    once = [pl.BlockSpec(a.shape, lambda *_: (0, 0), pipeline_mode=pl.Buffered(1)) for a in resident]
    tile = [((TILE, columns), word), ((TILE, columns), word), ((TILE, d), x.dtype), ((TILE, d), jnp.float32)]
    words = [((window, columns), word)] * 2 if x.dtype == jnp.bfloat16 else []
    return pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(lists[0].shape[0],),
            in_specs=[*own, tokens, *once],
            out_specs=tokens,
            scratch_shapes=[pltpu.VMEM(*scratch) for scratch in (*tile, *words)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=limit),
        interpret=interpret,
        name="routed_ffn",
    )(chunks, *lists, x, *resident)


def _kernel(
    chunks, order, groups, firsts, tiles, x, w_in, b_in, w_out, b_out, out, fetched, finished, inputs, total, *words
):
    from jax.experimental import pallas as pl

    words_in, words_out = words or (x, out)
    # float32 means float32: the matrix unit would round to bfloat16 otherwise.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    product = partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    def rows_and_places(tile):
        first = firsts[0, 0, tile]
        for row in range(TILE):  # one by one: there are few scalar registers
            yield pl.ds(row, 1), pl.ds(order[0, 0, first + row], 1)

    def fetch(tile):
        for row, place in rows_and_places(tile):
            fetched[row] = words_in[place]

    def put_back(tile):
        """Also rows behind the tile's group: those groups follow and overwrite them."""
        for row, place in rows_and_places(tile):
            words_out[place] = finished[row]

    def output_of(chunk, computed=True):
        neurons = pl.ds(pl.multiple_of(chunk * CHUNK, CHUNK), CHUNK)
        hidden = product(inputs[...], w_in[neurons], (((1,), (1,)), ((), ()))) + b_in[pl.ds(chunk, 1)]
        hidden = jnp.where(computed, jnp.maximum(hidden, 0), 0).astype(x.dtype)
        return product(hidden, w_out[neurons], (((1,), (0,)), ((), ())))

    if words:

        @pl.loop(0, x.shape[0] // TILE)
        def _(i):
            rows = pl.ds(pl.multiple_of(i * TILE, TILE), TILE)
            words_in[rows] = _to_words(x[rows], fetched.dtype)

    fetch(0)

    @pl.loop(0, tiles[0, 0, 0])
    def _(i):
        group = groups[0, 0, i]
        first, end = chunks[group], chunks[group + 1]
        inputs[...] = _from_words(fetched[...], x.dtype)
        fetch(i + 1)
        put_back(jnp.maximum(i - 1, 0))
        # The first chunk has no branch around it, so that the compiler puts its products beside the copies.
        some_chunk = jnp.minimum(first, b_in.shape[0] - 1)
        total[...] = b_out[pl.ds(group, 1)] + output_of(some_chunk, computed=first < end)

        @pl.loop(first + 1, end)
        def _(chunk):
            total[...] += output_of(chunk)

        finished[...] = _to_words(total[...].astype(x.dtype), finished.dtype)

    put_back(tiles[0, 0, 0] - 1)
    if words:

        @pl.loop(0, x.shape[0] // TILE)
        def _(i):
            rows = pl.ds(pl.multiple_of(i * TILE, TILE), TILE)
            out[rows] = _from_words(words_out[rows], x.dtype)


def _to_words(values, word):
    if word == jnp.float32:
        return values.astype(word)
    # bfloat16 is the upper half of float32.
    low, high = jnp.split(jax.lax.bitcast_convert_type(values.astype(jnp.float32), word), 2, axis=1)
    return (low >> 16) | high


def _from_words(words, dtype):
    if words.dtype == jnp.float32:
        return words.astype(dtype)
    halves = jnp.concatenate([words << 16, words & jnp.uint32(0xFFFF0000)], axis=1)
    return jax.lax.bitcast_convert_type(halves, jnp.float32).astype(dtype)


def _word_columns(d: int, dtype: jnp.dtype) -> int:
    """Words of 32 bits per row."""
    return d // 2 if dtype == jnp.bfloat16 and d % (2 * LANES) == 0 else d


def _padded(width: int) -> int:
    return -(-width // CHUNK) * CHUNK


def _resident_bytes(shape: ExpertsShape) -> int:
    neurons = max(sum(map(_padded, shape.widths)), CHUNK)
    registers = 8  # rows of a register, to which small arrays are padded
    biases = -(-neurons // CHUNK // registers) * registers * CHUNK + (len(shape.widths) + registers) * shape.d_model
    return 2 * neurons * shape.d_model * shape.dtype.itemsize + 4 * biases


def _window_bytes(shape: ExpertsShape, window: int) -> int:
    d, itemsize, words = shape.d_model, shape.dtype.itemsize, 4 * _word_columns(shape.d_model, shape.dtype)
    # Inputs and outputs twice, because those of the next and the previous window are on their way meanwhile.
    token = 4 * d * itemsize + (2 * words if shape.dtype == jnp.bfloat16 else 0)
    return window * token + TILE * (2 * words + d * itemsize + 4 * d)


def _window(shape: ExpertsShape, memory: int) -> int:
    """Tokens of a window: as few windows as fit, of about the same size; 0 if not even a tile fits."""
    left = memory - RESERVE - _resident_bytes(shape) - _window_bytes(shape, 0)
    tile = _window_bytes(shape, TILE) - _window_bytes(shape, 0)
    most = min(left // tile, WINDOW // TILE)
    if most <= 0:
        return 0
    tiles = -(-shape.tokens // TILE)
    return -(-tiles // -(-tiles // most)) * TILE
