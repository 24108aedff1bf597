"""Multi-scale sampling on TPUs: interpreted, with a check for races, and compiled for TPUs that are not here."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from detr_jax.kernels import sampling_tpu
from detr_jax.kernels.backend import SamplingShape
from detr_jax.kernels.sampling import multi_scale_sampling, multi_scale_sampling_reference

INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
LEVELS = ((19, 37), (10, 19), (5, 10))
HEADS, FEATURES, POINTS = 4, 32, 2


def centres(levels):
    grids = [np.stack(np.meshgrid((np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h), -1) for h, w in levels]
    return np.concatenate([grid.reshape(-1, 2) for grid in grids]).astype(np.float32)


def arrays(levels=LEVELS, spread=4.0, dtype="float32", batch=2):
    """Values, locations up to `spread` cells of each level from the query, and weights."""
    random = np.random.default_rng(0)
    places = centres(levels)
    value = jnp.asarray(random.standard_normal((batch, len(places), HEADS, FEATURES)), dtype)
    offsets = random.uniform(-spread, spread, (batch, len(places), HEADS, len(levels), POINTS, 2)).astype(np.float32)
    offsets /= np.array([(w, h) for h, w in levels], np.float32)[:, None]
    weights = random.uniform(0, 1, offsets.shape[:-1]).astype(np.float32)
    return value, places[:, None, None, None] + offsets, weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_the_definition(dtype):
    value, locations, weights = arrays(dtype=dtype)
    assert sampling_tpu.fits(LEVELS, locations)
    found = sampling_tpu.run(value, LEVELS, locations, weights, interpret=INTERPRET)
    assert found.dtype == value.dtype
    exact = multi_scale_sampling_reference(value.astype(jnp.float32), LEVELS, locations, weights)
    tolerance = {"float32": {"atol": 2e-5}, "bfloat16": {"atol": 0.06}}[dtype]
    np.testing.assert_allclose(found.astype(jnp.float32), exact, **tolerance)


def test_values_outside_of_a_level_are_zero():
    value, locations, weights = arrays(levels=((9, 17), (5, 9)))
    locations[:, :40] = -0.2
    locations[:, -3:, ..., 0] = 1.5
    shapes = ((9, 17), (5, 9))
    found = sampling_tpu.run(value, shapes, locations, weights, interpret=INTERPRET)
    exact = multi_scale_sampling_reference(value, shapes, locations, weights)
    np.testing.assert_allclose(found, exact, atol=2e-5)
    assert not exact[:, :40].any()


def test_one_far_sample_is_noticed():
    """A level wider than a window, so that a sample can be beyond it."""
    levels = ((8, 80),)
    _, locations, _ = arrays(levels)
    assert sampling_tpu.fits(levels, locations)
    far = locations.copy()
    far[1, 5, 3, 0, 1, 0] = 70.5 / 80
    assert not sampling_tpu.fits(levels, far)
    outside = locations.copy()
    outside[1, 5, 3, 0, 1, 0] = -0.5  # the nearest cell of the level is in the window, and what is outside is zero
    assert sampling_tpu.fits(levels, outside)


@pytest.fixture
def on_a_tpu(monkeypatch):
    """The kernel is taken, interpreted."""
    monkeypatch.setattr(sampling_tpu, "unsupported_reason", sampling_tpu.unsupported)
    monkeypatch.setattr(sampling_tpu, "run", partial(sampling_tpu.run, interpret=INTERPRET))


def test_far_samples_are_gathered(on_a_tpu):
    levels = ((8, 80),)
    value, locations, weights = arrays(levels)
    locations[0, 3, 1, 0, 0, 0] = 0.99
    exact = multi_scale_sampling_reference(value, levels, locations, weights)
    np.testing.assert_allclose(multi_scale_sampling(value, levels, locations, weights), exact, atol=2e-5)


def test_gradients_are_those_of_the_definition(on_a_tpu):
    levels = ((8, 16),)
    given = arrays(levels, spread=2.0, batch=1)

    def gradients(run):
        return jax.grad(lambda *arrays: (run(arrays[0], levels, *arrays[1:]) ** 2).sum(), argnums=(0, 1, 2))(*given)

    for found, expected in zip(gradients(multi_scale_sampling), gradients(multi_scale_sampling_reference), strict=True):
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-4)


def shape(levels=LEVELS, queries=None, dtype="bfloat16", heads=8, features=32):
    cells = sum(height * width for height, width in levels)
    return SamplingShape(jnp.dtype(dtype), cells if queries is None else queries, levels, heads, features)


def test_what_it_cannot_compute_has_a_reason():
    reason = sampling_tpu.unsupported
    assert reason(shape()) is None and reason(shape(FULL)) is None and reason(shape(FULL, dtype="float32")) is None
    assert "not in float16" in reason(shape(dtype="float16"))
    assert "queries are not the cells" in reason(shape(queries=300))
    assert "8 heads of 24 features" in reason(shape(features=24))
    assert "6 heads of 32 features" in reason(shape(heads=6))
    assert "take 38 of 16 MiB" in reason(shape(((200, 300), (100, 150)), dtype="float32"))


FULL = ((100, 167), (50, 84), (25, 42), (13, 21))
"""Levels of a Deformable DETR for images of 800x1333 pixels."""


@pytest.mark.parametrize(
    ("topology", "dtype"),
    [*((name, "bfloat16") for name in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")), ("v4:2x2x1", "float32")],
)
def test_compiles_for_tpus(topology, dtype):
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install libtpu")
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    cells = sum(height * width for height, width in FULL)
    samples = (1, cells, 8, 4, 4)
    types = [((1, cells, 8, 32), dtype), ((*samples, 2), "float32"), (samples, "float32")]
    operands = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in types]
    run = jax.jit(lambda value, locations, weights: sampling_tpu.run(value, FULL, locations, weights))
    assert "tpu_custom_call" in run.lower(*operands).compile().as_text()
