"""Multi-scale sampling for TPUs, in Pallas, where every cell of every level is a query that samples near itself.

TPUs have no gather of single rows in vector memory. A grid step takes a tile of neighbouring queries of one level and,
of each level, a window of cells around it; the samples of a query are a row of a matrix over the cells of the window,
made of the overlaps that define bilinear reading, and a product with the values follows, some rows of the window at a
time. Queries lie along the lanes, so that overlaps are made for all of a tile at once.

Locations are data: a sample outside of its window would be lost. `fits` tells whether there is any; then
`sampling.multi_scale_sampling` gathers instead.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.kernels.backend import SamplingShape
from detr_jax.kernels.tpu import LANES, SMALLEST_MEMORY, absent, vector_memory

ROWS, COLUMNS = 8, 16
"""Queries of a tile, which fill the lanes."""
MARGIN = 8
"""Cells of each level by which a window reaches beyond its tile; windows of coarse levels end with the level."""
SUBLANES = 16
"""Rows of registers of bfloat16; windows have whole ones of columns."""
CHUNK = 8
"""Rows of a window whose cells are multiplied at once; windows have whole chunks."""
RESERVE = 13 << 18
"""Bytes of vector memory for windows, their matrices and the compiler."""


class Window(NamedTuple):
    """Cells of one level that the queries of a tile may sample."""

    rows: int
    columns: int


def unsupported_reason(shape: SamplingShape) -> str | None:
    """Why this cannot sample on the default device; None if it can."""
    return absent() or unsupported(shape, vector_memory())


def unsupported(shape: SamplingShape, memory: int = SMALLEST_MEMORY) -> str | None:
    """Why this cannot sample on a TPU with so many bytes of vector memory; None if it can."""
    if shape.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it computes in float32 or bfloat16, not in {shape.dtype}"
    if shape.queries != sum(height * width for height, width in shape.levels):
        return "its queries are not the cells of the levels"
    if LANES % shape.features or shape.heads % (LANES // shape.features):
        return f"{shape.heads} heads of {shape.features} features do not fill registers of {LANES}"
    size = sum(math.prod(_padded(level)) for level in shape.levels) * LANES * jnp.dtype(shape.dtype).itemsize
    if size + RESERVE > memory:
        return (
            f"the values of some heads take {size / 2**20:.0f} of {memory / 2**20:.0f} MiB of vector memory, too many"
        )
    return None


def window_of(query_level: tuple[int, int], level: tuple[int, int]) -> Window:
    """The window of a level for tiles of another one: their extent, a margin, and room to begin at whole registers."""
    rows, columns = (
        math.ceil(side * of_values / of_queries) + 2 * MARGIN + 2
        for side, of_values, of_queries in zip((ROWS, COLUMNS), level, query_level, strict=True)
    )
    height, width = _padded(level)
    return Window(min(_whole(rows, CHUNK), height), min(_whole(columns + SUBLANES - 1, SUBLANES), width))


def _whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _padded(level: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a level in vector memory."""
    return _whole(level[0], CHUNK), _whole(level[1], SUBLANES)


def window_starts(query_level: tuple[int, int], level: tuple[int, int]) -> np.ndarray:
    """(tiles, 2) int32, first row and column of the window of each tile of the queries, tiles row by row."""
    window, starts = window_of(query_level, level), []
    for axis, side in enumerate((ROWS, COLUMNS)):
        tiles = np.arange(-(-query_level[axis] // side))
        centre = np.minimum((tiles + 0.5) * side, query_level[axis] - side / 2) * level[axis] / query_level[axis]
        limit = _padded(level)[axis] - window[axis]
        first = np.clip(np.floor(centre - window[axis] / 2), 0, limit)
        starts.append((first // SUBLANES * SUBLANES if axis else first).astype(np.int32))
    return np.stack(np.meshgrid(*starts, indexing="ij"), axis=-1).reshape(-1, 2)


def fits(shapes: tuple[tuple[int, int], ...], locations: jax.Array) -> jax.Array:
    """Whether all samples at locations (batch, queries, heads, levels, points, 2) lie in their windows, () bool."""
    inside = jnp.bool_(True)
    for query_level, tiled in zip(shapes, _tiles(shapes, locations), strict=True):
        for index, level in enumerate(shapes):
            starts, window = window_starts(query_level, level), window_of(query_level, level)
            for axis in (0, 1):
                cell = jnp.floor(tiled[:, :, :, :, index, :, 1 - axis] * level[axis] - 0.5)
                # What lies outside of the level is zero wherever it is read.
                first, last = jnp.clip(cell, 0, level[axis] - 1), jnp.clip(cell + 1, 0, level[axis] - 1)
                start = jnp.asarray(starts[:, axis], jnp.float32)[:, None, None, None]
                inside &= ((first >= start) & (last < start + window[axis])).all()
    return inside


def _tiles(shapes: tuple[tuple[int, int], ...], array: jax.Array) -> list[jax.Array]:
    """(batch, queries, ...) -> (batch, tiles, ROWS * COLUMNS, ...) of each level; those at edges repeat queries."""
    found, start = [], 0
    for height, width in shapes:
        rows, columns = -(-height // ROWS), -(-width // COLUMNS)
        level = array[:, start : start + height * width].reshape(len(array), height, width, *array.shape[2:])
        more = [(0, 0), (0, rows * ROWS - height), (0, columns * COLUMNS - width), *[(0, 0)] * (array.ndim - 2)]
        level = jnp.pad(level, more, mode="edge").reshape(len(array), rows, ROWS, columns, COLUMNS, *array.shape[2:])
        found.append(level.swapaxes(2, 3).reshape(len(array), rows * columns, ROWS * COLUMNS, *array.shape[2:]))
        start += height * width
    return found


def run(
    value: jax.Array,
    shapes: tuple[tuple[int, int], ...],
    locations: jax.Array,
    weights: jax.Array,
    *,
    interpret: Any = False,
) -> jax.Array:
    """`sampling.multi_scale_sampling` of locations that `fits` accepts.

    Args:
        value, shapes, locations, weights: as there; there is a query for every cell.
        interpret: takes `pltpu.InterpretParams`, for tests on other devices.
    """
    batch, _, heads, features = value.shape
    together = LANES // features  # heads whose values share registers
    packed = value.reshape(batch, -1, heads // together, LANES).swapaxes(1, 2)
    levels, start = [], 0
    for height, width in shapes:
        cells = packed[:, :, start : start + height * width].reshape(batch, -1, height, width, LANES)
        rows, columns = _padded((height, width))
        levels.append(jnp.pad(cells, ((0, 0), (0, 0), (0, rows - height), (0, columns - width), (0, 0))))
        start += height * width

    # Queries to the lanes: (batch, tiles, heads / together, together * levels * points, queries of a tile).
    def to_lanes(array: jax.Array) -> jax.Array:
        split = array.reshape(*array.shape[:3], heads // together, -1)
        return split.transpose(0, 1, 3, 4, 2)

    outputs = []
    of_points = zip(*(_tiles(shapes, array) for array in (locations[..., 0], locations[..., 1], weights)), strict=True)
    for query_level, (x, y, weight) in zip(shapes, of_points, strict=True):
        starts = [jnp.asarray(window_starts(query_level, level)) for level in shapes]
        windows = tuple(window_of(query_level, level) for level in shapes)
        columns = -(-query_level[1] // COLUMNS)
        lanes = [to_lanes(array.astype(jnp.float32)) for array in (x, y, weight)]
        found = _call(levels, starts, lanes, shapes, windows, together, interpret)
        tiled = found.reshape(batch, heads // together, -1, columns, LANES, ROWS, COLUMNS)
        grid = tiled.transpose(0, 2, 5, 3, 6, 1, 4).reshape(batch, -1, columns * COLUMNS, heads * features)
        grid = grid[:, : query_level[0], : query_level[1]]
        outputs.append(grid.reshape(batch, -1, heads * features))
    return jnp.concatenate(outputs, axis=1)


def _call(levels, starts, lanes, shapes, windows, together, interpret):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu  # 0.2 seconds: not where it does not run

    batch, tiles, groups, samples, queries = lanes[0].shape
    dtype = levels[0].dtype
    once = {"pipeline_mode": pl.Buffered(1)}
    values = [
        pl.BlockSpec((None, None, *level.shape[2:]), lambda b, g, t, *_: (b, g, 0, 0, 0), **once) for level in levels
    ]
    of_tile = pl.BlockSpec((None, None, None, samples, queries), lambda b, g, t, *_: (b, t, g, 0, 0))
    size = sum(math.prod(level.shape[2:]) for level in levels) * dtype.itemsize
    return pl.pallas_call(
        partial(_kernel, len(levels), shapes, windows, together),
        out_shape=jax.ShapeDtypeStruct(
            (batch, groups, tiles, LANES, queries), dtype, manual_axis_type=jax.typeof(levels[0]).manual_axis_type
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(starts),
            grid=(batch, groups, tiles),
            in_specs=[*values, of_tile, of_tile, of_tile],
            out_specs=pl.BlockSpec((None, None, None, LANES, queries), lambda b, g, t, *_: (b, g, t, 0, 0)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=size + RESERVE
        ),
        interpret=interpret,
        name="multi_scale_sampling",
    )(*starts, *levels, *lanes)


def _kernel(count, shapes, windows, together, *refs):
    from jax.experimental import pallas as pl

    starts, levels, (xs, ys, weights, out) = refs[:count], refs[count : 2 * count], refs[2 * count :]
    tile, features, queries = pl.program_id(2), LANES // together, xs.shape[1]
    dtype = levels[0].dtype
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    points = xs.shape[0] // (together * count)
    total = tuple(jnp.zeros((features, queries), jnp.float32) for _ in range(together))
    for index, (level, (rows, columns)) in enumerate(zip(levels, windows, strict=True)):
        height, width = shapes[index]
        row, column = starts[index][tile, 0], pl.multiple_of(starts[index][tile, 1], SUBLANES)
        x_of = _from(column, (1, columns, queries), 1)

        def add_rows(
            chunk,
            total,
            index=index,
            level=level,
            columns=columns,
            height=height,
            width=width,
            row=row,
            column=column,
            x_of=x_of,
        ):
            first = row + chunk * CHUNK
            cells = level[pl.ds(first, CHUNK), pl.ds(column, columns), :].reshape(CHUNK * columns, LANES)
            y_of = _from(first, (CHUNK, 1, queries), 0)
            found = []
            for head in range(together):
                matrix = jnp.zeros((CHUNK, columns, queries), jnp.float32)
                for point in range(points):
                    sample = pl.ds((head * count + index) * points + point, 1)
                    x, y = xs[sample] * width - 0.5, ys[sample] * height - 0.5  # (1, queries)
                    overlap_y = jnp.maximum(0, 1 - jnp.abs(y[None] - y_of)) * weights[sample][None]
                    matrix += overlap_y * jnp.maximum(0, 1 - jnp.abs(x[None] - x_of))
                read = jax.lax.dot_general(
                    cells,
                    matrix.reshape(CHUNK * columns, -1).astype(dtype),
                    (((0,), (0,)), ((), ())),
                    precision=precision,
                    preferred_element_type=jnp.float32,
                )
                found.append(total[head] + read[head * features : (head + 1) * features])
            return tuple(found)

        total = jax.lax.fori_loop(0, rows // CHUNK, add_rows, total)
    out[...] = jnp.concatenate(total, axis=0).astype(dtype)


def _from(first, shape, axis):
    """first, first + 1, ... along an axis, float32."""
    return (first + jax.lax.broadcasted_iota(jnp.int32, shape, axis)).astype(jnp.float32)
