"""Orders of an image's tokens, which decide what a tile of consecutive tokens is; an FFN works in any of them.

An order of a grid is an array (rows * columns,) whose entry p is the token, counted row by row, that comes to place p.
The order by signature, which depends on what tokens need, is `kernels.signature_order`.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Grid = tuple[int, int]
"""Rows and columns of tokens."""

GridOrder = Literal["raster", "windows", "hilbert"]
"""What can be known of an order before the image is."""


def grid_order(kind: GridOrder, grid: Grid, tile_size: int) -> np.ndarray:
    """An order by name.

    Args:
        kind: row by row, in windows of a tile each, or along a Hilbert curve.
        grid: of the tokens.
        tile_size: tokens per tile.
    """
    orders: dict[GridOrder, Callable[[], np.ndarray]] = {
        "raster": lambda: np.arange(grid[0] * grid[1]),
        "windows": lambda: window_order(grid, window_shape(tile_size)),
        "hilbert": lambda: hilbert_order(grid),
    }
    return orders[kind]()


def window_shape(tokens: int) -> Grid:
    """The window of that many tokens that is closest to a square, no higher than wide: 8 -> (2, 4), 64 -> (8, 8)."""
    rows = next(rows for rows in range(int(tokens**0.5), 0, -1) if tokens % rows == 0)
    return rows, tokens // rows


def window_order(grid: Grid, window: Grid) -> np.ndarray:
    """The order that goes from window to window and row by row in each.

    Windows at the right and lower edge hold what is left there; where that is less than a window, tiles of as many
    tokens as a window has do not begin where windows do any more.
    """
    rows, columns = np.indices(grid).reshape(2, -1)
    return np.lexsort((columns, rows, columns // window[1], rows // window[0]))


def hilbert_order(grid: Grid) -> np.ndarray:
    """The order along a Hilbert curve: consecutive tokens are neighbours, and many of them fill a compact area.

    J. Cerveny's generalisation to rectangles of any size (https://github.com/jakubcerveny/gilbert). One step is
    diagonal where the longer side is odd and the shorter one even.
    """
    rows, columns = grid
    down, right = np.array([rows, 0]), np.array([0, columns])
    along, across = (right, down) if columns >= rows else (down, right)
    path = np.array(list(_hilbert(np.zeros(2, int), along, across)))
    return path[:, 0] * columns + path[:, 1]


def _hilbert(start: np.ndarray, along: np.ndarray, across: np.ndarray) -> Iterator[np.ndarray]:
    """The curve through the rectangle that two vectors span, from its first corner to the end of `along`."""
    length, width = abs(along.sum()), abs(across.sum())
    step, side_step = np.sign(along), np.sign(across)
    if width == 1 or length == 1:
        for i in range(max(length, width)):
            yield start + i * (step if width == 1 else side_step)
        return
    half, side = along // 2, across // 2
    # Halves of even length keep the curve free of diagonal steps.
    if 2 * length > 3 * width:
        if abs(half.sum()) % 2 and length > 2:
            half = half + step
        yield from _hilbert(start, half, across)
        yield from _hilbert(start + half, along - half, across)
    else:
        if abs(side.sum()) % 2 and width > 2:
            side = side + side_step
        yield from _hilbert(start, side, half)
        yield from _hilbert(start + side, along, across - side)
        yield from _hilbert(start + along - step + side - side_step, -side, half - along)


def padding_last(order: jax.Array, tokens: jax.Array) -> jax.Array:
    """An order for every image of a batch, what is padding there behind what is not; jittable.

    Args:
        order: (tokens,).
        tokens: (images, tokens) bool, false for padding.

    Returns:
        (images, tokens) int32, the token that comes to each place.
    """
    order = jnp.asarray(order)
    behind = jnp.argsort(~tokens[:, order], axis=1, stable=True)
    return order[behind].astype(jnp.int32)
