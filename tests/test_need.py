"""What tiles need: equal to a loop's, blind to padding, additive."""

import jax
import numpy as np
import pytest
from standalone import FFNInputs, StandaloneFFNs
from tiny import tiny_ffn
from top_p import measure_top_p, needed

SHARE = 0.9


def fewest(row: np.ndarray) -> np.ndarray:
    """The entries that make up `SHARE` of a row, largest first."""
    found = np.zeros(len(row), bool)
    for entry in np.argsort(-row):
        if row[found].sum() >= SHARE * row.sum():
            break
        found[entry] = True
    return found


def test_the_fewest_entries_are_found():
    rng = np.random.default_rng(0)
    rows = rng.exponential(size=(50, 20)).astype(np.float32) * (rng.random((50, 20)) < 0.7)
    rows[0] = 0
    np.testing.assert_array_equal(jax.jit(needed)(rows, SHARE), [fewest(row) for row in rows])
    assert not np.asarray(needed(rows, 1.0))[rows == 0].any()


@pytest.mark.parametrize("tile_size", [1, 4, None])
def test_statistics_are_those_of_a_loop(tile_size):
    weights, x, tokens = tiny_ffn()
    hidden = np.maximum(np.asarray(x) @ np.asarray(weights.w_in).T + np.asarray(weights.b_in), 0)
    contributed = hidden * np.linalg.norm(weights.w_out, axis=1)
    needs, shares = [], []
    for image, exists in zip(contributed, np.asarray(tokens), strict=True):
        size = tile_size or len(image)
        for start in range(0, len(image), size):
            part = slice(start, start + size)
            if exists[part].any():
                total = image[part][exists[part]].sum(0)
                needs.append(fewest(total))
                shares.append(total / max(total.sum(), 1e-30))
    needs = np.array(needs, int)

    model, inputs = StandaloneFFNs({"a": weights}), FFNInputs({"a": x}, {"a": tokens})
    found = measure_top_p(model, [inputs], tile_size, SHARE)["a"]
    assert found.tiles == len(needs)
    np.testing.assert_array_equal(found.coneeded, needs.T @ needs)
    np.testing.assert_allclose(found.contributed, np.sum(shares, axis=0), rtol=1e-5, atol=1e-6)

    halves = [jax.tree.map(lambda array, part=part: array[part], inputs) for part in (slice(1), slice(1, None))]
    added = measure_top_p(model, halves, tile_size, SHARE)["a"]
    np.testing.assert_array_equal(added.coneeded, found.coneeded)
    assert added.tiles == found.tiles and added.coneeded.dtype == np.int64


def test_bad_input_is_refused():
    weights, x, tokens = tiny_ffn()
    model, inputs = StandaloneFFNs({"a": weights}), FFNInputs({"a": x}, {"a": tokens})
    with pytest.raises(ValueError, match="at least 1 token, not 0"):
        measure_top_p(model, [inputs], 0, SHARE)
    with pytest.raises(ValueError, match="no images"):
        measure_top_p(model, [], 4, SHARE)
