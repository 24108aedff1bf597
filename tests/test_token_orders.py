"""Orders of tokens: no token is lost, padding comes last, and neighbours stay together."""

import itertools
from typing import get_args

import numpy as np
import pytest
from token_orders import GridOrder, grid_order, hilbert_order, padding_last, window_shape

GRIDS = [(1, 1), (1, 7), (8, 8), (8, 14), (14, 8), (7, 12), (5, 9), (25, 42), (3, 40)]


@pytest.mark.parametrize("kind", get_args(GridOrder))
@pytest.mark.parametrize("grid", GRIDS)
def test_every_token_has_a_place(kind, grid):
    for tile_size in (1, 8, 16, 64):
        order = grid_order(kind, grid, tile_size)
        np.testing.assert_array_equal(np.sort(order), np.arange(grid[0] * grid[1]))


@pytest.mark.parametrize("grid", [*GRIDS, *itertools.product(range(1, 12), repeat=2)])
def test_hilbert_neighbours_are_neighbours(grid):
    rows, columns = np.divmod(hilbert_order(grid), grid[1])
    steps = np.abs(np.diff(rows)) + np.abs(np.diff(columns))
    diagonal = max(grid) % 2 == 1 and min(grid) % 2 == 0
    assert (steps != 1).sum() <= diagonal
    assert np.maximum(np.abs(np.diff(rows)), np.abs(np.diff(columns))).max(initial=1) == 1


def test_hilbert_tiles_are_compact():
    rows, columns = np.divmod(hilbert_order((16, 32)).reshape(-1, 16), 32)
    assert (np.ptp(rows, 1) == 3).all() and (np.ptp(columns, 1) == 3).all()


@pytest.mark.parametrize(("tokens", "shape"), [(1, (1, 1)), (7, (1, 7)), (8, (2, 4)), (64, (8, 8)), (128, (8, 16))])
def test_windows_are_nearly_square(tokens, shape):
    assert window_shape(tokens) == shape


def test_windows_are_tiles_where_they_fit():
    rows, columns = np.divmod(grid_order("windows", (8, 12), 16).reshape(-1, 16), 12)
    windows = rows // 4 * 3 + columns // 4
    np.testing.assert_array_equal(windows, np.repeat(np.arange(6), 16).reshape(6, 16))


def test_windows_at_the_edge_hold_what_is_left():
    expected = [0, 1, 2, 3, 7, 8, 9, 10, 4, 5, 6, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]
    np.testing.assert_array_equal(grid_order("windows", (3, 7), 8), expected)


def test_padding_comes_last():
    tokens = np.ones((3, 12), bool)
    tokens[1, 6:] = False
    tokens[2] = np.arange(12) % 4 < 3  # the last column of a grid of 3 x 4
    order = grid_order("hilbert", (3, 4), 4)
    placed = np.asarray(padding_last(order, tokens))
    np.testing.assert_array_equal(placed[0], order)
    for row, there in zip(placed, tokens, strict=True):
        expected = [*(token for token in order if there[token]), *(token for token in order if not there[token])]
        np.testing.assert_array_equal(row, expected)
