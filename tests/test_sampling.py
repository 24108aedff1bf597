"""Multi-scale sampling: its form without an array of all taps against its definition."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run

from detr_jax.kernels.sampling import multi_scale_sampling, multi_scale_sampling_reference

SHAPES = ((7, 9), (4, 5), (1, 2))
CELLS = sum(height * width for height, width in SHAPES)


def arrays():
    """Values of two images, locations of which a quarter lies outside, and weights."""
    random = np.random.default_rng(0)
    value = random.standard_normal((2, CELLS, 4, 8)).astype(np.float32)
    locations = random.uniform(-0.1, 1.1, (2, 11, 4, len(SHAPES), 3, 2)).astype(np.float32)
    weights = random.uniform(0, 1, locations.shape[:-1]).astype(np.float32)
    return value, locations, weights


def test_it_is_the_definition():
    value, locations, weights = arrays()
    found = multi_scale_sampling(value, SHAPES, locations, weights)
    assert found.shape == (2, 11, 32)
    np.testing.assert_allclose(found, multi_scale_sampling_reference(value, SHAPES, locations, weights), atol=2e-6)


def test_centres_of_cells_and_what_is_outside():
    value = np.arange(CELLS, dtype=np.float32).reshape(1, CELLS, 1, 1)
    centre = (np.array([3, 2]) + 0.5) / (9, 7)  # column 3 of row 2 of the first level
    locations = np.full((1, 3, 1, 3, 1, 2), -1, np.float32)
    locations[0, 0, 0, 0, 0], locations[0, 1, 0, 0, 0] = centre, (1 + 0.5 / 9, 0.5)
    weights = np.ones(locations.shape[:-1], np.float32)
    found = multi_scale_sampling(value, SHAPES, locations, weights)
    np.testing.assert_allclose(found[0, :, 0], [2 * 9 + 3, 0, 0], atol=1e-5)
    halfway = locations.copy()
    halfway[0, 1, 0, 0, 0, 0] = 1  # half of the last column, 8 of row 3, and half of nothing
    found = multi_scale_sampling(value, SHAPES, halfway, weights)
    np.testing.assert_allclose(found[0, 1, 0], (3 * 9 + 8) / 2, rtol=1e-6)


def test_gradients():
    given, mixed = arrays(), np.random.default_rng(1).standard_normal((2, 11, 32)).astype(np.float32)

    def gradients(run):
        return jax.grad(lambda *arrays: (run(arrays[0], SHAPES, *arrays[1:]) * mixed).sum(), argnums=(0, 1, 2))(*given)

    for found, expected in zip(gradients(multi_scale_sampling), gradients(multi_scale_sampling_reference), strict=True):
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_bfloat16_values_are_summed_in_float32():
    value, locations, weights = arrays()
    value = jnp.asarray(value, jnp.bfloat16)
    found = multi_scale_sampling(value, SHAPES, locations, weights)
    assert found.dtype == jnp.bfloat16
    exact = multi_scale_sampling_reference(value.astype(jnp.float32), SHAPES, locations, weights)
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def test_against_grid_sample():
    torch = pytest.importorskip("torch")
    value, locations, weights = arrays()
    expected, start = 0, 0
    for level, (height, width) in enumerate(SHAPES):
        cells = value[:, start : start + height * width].reshape(2, height, width, 4, 8).transpose(0, 3, 4, 1, 2)
        grid = (2 * locations[:, :, :, level] - 1).transpose(0, 2, 1, 3, 4).reshape(8, 11, 3, 2)
        sampled = torch.nn.functional.grid_sample(
            torch.from_numpy(cells.reshape(8, 8, height, width)), torch.from_numpy(grid), align_corners=False
        )
        of_points = weights[:, :, :, level].transpose(0, 2, 1, 3).reshape(8, 1, 11, 3)
        expected += (sampled.numpy() * of_points).sum(-1)
        start += height * width
    expected = expected.reshape(2, 4, 8, 11).transpose(0, 3, 1, 2).reshape(2, 11, 32)
    np.testing.assert_allclose(multi_scale_sampling(value, SHAPES, locations, weights), expected, atol=2e-6)


def test_the_benchmark(tmp_path):
    pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    small = ("--height", 64, "--width", 96, "--heads", 2, "--features", 8, "--points", 2, "--repeats", 1)
    run("benchmarks/sampling.py", *small, "--out", tmp_path / "times.json")
    report = json.loads((tmp_path / "times.json").read_text())
    assert report["tokens"] == 8 * 12 + 4 * 6 + 2 * 3 + 2 and report["largest difference"] < 1e-5
    assert report["ours / torch"] == report["medians"]["ours"] / report["medians"]["torch, grid_sample"]
