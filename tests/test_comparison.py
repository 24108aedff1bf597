"""What the comparison of selectors measures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from studies.common import one_at_a_time
from tile_density import measure_tile_density, measure_tiles
from tiny import TINY_CONFIG, annotation, tiny_detector, write_coco

from detr_jax.calibration.sensitivity import OutputDivergence, layer_sensitivity
from detr_jax.data.coco import CocoDataset
from detr_jax.data.features import backbone_features
from detr_jax.evaluation.comparison import Comparison
from detr_jax.evaluation.counts import ActivityCounts
from detr_jax.evaluation.flops import dense_flops, remaining_share, sparse_flops
from detr_jax.evaluation.runs import detect
from detr_jax.methods import HiddenMagnitude, InputMagnitude, LinearGate, Oracle, Random, Thresholded, restricted_to
from detr_jax.models import DetrOutputs
from detr_jax.models.detr.outputs import output_divergence


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    boxes = [annotation(i, i, (4, 4, 20, 20), category_id=1 + i % 2) for i in range(1, 6)]
    return CocoDataset(write_coco(tmp_path_factory.mktemp("coco"), [(32, 40)] * 5, boxes), "val2017")


@pytest.fixture(scope="module")
def model():
    return tiny_detector()


@pytest.fixture(scope="module")
def embedded(model, dataset):
    return list(backbone_features(model, dataset, 2, "images"))


def test_output_change_is_divergence_and_distance_of_likely_objects():
    rng = np.random.default_rng(0)
    before, after = (
        DetrOutputs(rng.standard_normal((2, 3, 4)).astype(np.float32), rng.random((2, 3, 4)).astype(np.float32))
        for _ in range(2)
    )
    p, q = (np.exp(o.logits) / np.exp(o.logits).sum(-1, keepdims=True) for o in (before, after))
    expected = (p * np.log(p / q)).sum(-1) + 5 * (1 - p[..., -1]) * np.abs(before.boxes - after.boxes).sum(-1)
    np.testing.assert_allclose(output_divergence(before, after), expected.mean(-1), rtol=1e-4)
    np.testing.assert_allclose(output_divergence(before, before), 0, atol=1e-6)


def test_the_work_that_is_left(model):
    d, features = TINY_CONFIG.d_model, TINY_CONFIG.encoder_ffn_dim
    counts = ActivityCounts(*[100, 10, 25, 10, 50, 10, 25, 10, 40, 20])
    gate = LinearGate(jnp.zeros((d, 4)), jnp.zeros(4))
    share = remaining_share(
        gate.traits, gate.cost(d, features), dataclasses.replace(counts, channels_computed=40), d, features
    )
    assert share == pytest.approx(0.25 + d * 4 / (2 * d * features))
    hidden, channels = HiddenMagnitude(weighted=False), InputMagnitude(weighted=False)
    whole = dataclasses.replace(counts, channels_computed=40)
    assert remaining_share(hidden.traits, hidden.cost(d, features), whole, d, features) == pytest.approx((1 + 0.25) / 2)
    only_channels = dataclasses.replace(counts, neurons_computed=100)
    left = remaining_share(channels.traits, channels.cost(d, features), only_channels, d, features)
    assert left == pytest.approx((0.5 + 1) / 2)

    flops = dense_flops(model, 32, 40)
    assert flops.ffns == {"encoder.0": 4.0 * d * features * 20, "decoder.0": 4.0 * d * features * 5}
    assert sum(flops.ffns.values()) < flops.transformer < flops.detector
    half = sparse_flops(flops, {"encoder.0": 0.5})
    saved = flops.ffns["encoder.0"] / 2
    assert half["ffns"] == pytest.approx(sum(flops.ffns.values()) - saved)
    assert half["detector"] == pytest.approx(flops.detector - saved)


def test_rows_are_compared_with_the_dense_detector(model, dataset, embedded):
    comparison = Comparison(model, dataset, embedded, 4)

    def measure(selectors):
        return comparison.row(selectors, comparison.detect(model, selectors))

    dense = measure({})
    assert dense["AP_minus_dense"] == 0 and dense["AP_minus_dense_interval"] == (0, 0)
    assert dense["density"] == dense["flops_share"]["ffns"] == dense["flops_share"]["detector"] == 1
    oracle = measure(dict.fromkeys(TINY_CONFIG.ffn_names, Oracle(4)))
    assert oracle["numbers"]["AP"] == pytest.approx(dense["numbers"]["AP"], abs=1e-9)
    assert oracle["recall"] == 1 and oracle["density"] < 1
    nothing = Thresholded(Random(4), jnp.float32(jnp.inf))
    empty = measure(dict.fromkeys(TINY_CONFIG.ffn_names, nothing))
    assert empty["density"] == empty["flops_share"]["ffns"] == 0 < empty["flops_share"]["transformer"]


def test_one_at_a_time_then_one_more_at_a_time():
    assert one_at_a_time({"a": 1, "b": 2}) == {
        "a alone": {"a": 1},
        "b alone": {"b": 2},
        "up to a": {"a": 1},
        "up to b": {"a": 1, "b": 2},
    }


def test_one_program_serves_every_subset_of_the_ffns_and_counts_the_others_as_dense(model, dataset, embedded):
    comparison = Comparison(model, dataset, embedded, 4)
    gates = dict.fromkeys(TINY_CONFIG.ffn_names, Thresholded(Random(4), jnp.float32(-0.5)))
    subsets = one_at_a_time(gates)
    comparison.detect(model, gates)
    programs = detect._cache_size()
    rows = {
        title: comparison.row(some, comparison.detect(model, restricted_to(gates, some)))
        for title, some in subsets.items()
    }
    assert detect._cache_size() == programs
    some = subsets["decoder.0 alone"]
    expected = comparison.row(some, comparison.detect(model, some))
    np.testing.assert_equal(rows["decoder.0 alone"], expected)
    assert rows["decoder.0 alone"]["ffns"]["encoder.0"]["flops_share"] == 1
    assert rows["up to decoder.0"]["density"] < rows["decoder.0 alone"]["density"] < 1


def test_a_frontier_measures_one_ffn_at_a_time(model, embedded):
    change = OutputDivergence(model, embedded)
    lots = [Thresholded(Random(4), jnp.float32(-density)) for density in (1, 0.5, 0.2)]
    settings = dict.fromkeys(TINY_CONFIG.ffn_names, lots)
    sensitivity = layer_sensitivity(change, (1, 0.5, 0.2), settings)
    assert (
        sensitivity.losses.shape == (2, 3)
        and (sensitivity.losses[:, 0] == 0).all()
        and (sensitivity.losses[:, 1:] > 0).all()
    )
    alone = {"decoder.0": sensitivity.selectors((0, 2))["decoder.0"]}
    assert change(alone) == pytest.approx(sensitivity.losses[1, 2], rel=1e-4)
    assert change({}) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="must fall from 1"):
        layer_sensitivity(change, (1, 0.2, 0.5), settings)


def test_the_ladder_rises_from_neurons_to_tiles(model, embedded):
    predicted = {name: Thresholded(Random(4), jnp.float32(-0.1)) for name in TINY_CONFIG.ffn_names}
    for steps in measure_tile_density(model, embedded, predicted, 4).values():
        exact = steps["exact"]["raster"]
        assert 0 < steps["neurons"] <= exact[1] <= exact[8] <= exact[16] <= exact[128] <= 1
        assert steps["exact"]["signature"][1] == exact[1]
        assert steps["predicted"]["raster"][1] == pytest.approx(0.1, abs=0.08)


def test_tiles_count_what_a_selector_keeps(model, embedded):
    tokens = [batch.tokens for batch in embedded]
    name = "encoder.0"
    selectors = {name: Oracle(4)}
    density = measure_tiles(model, tokens, selectors, 4, (1, 7))[name]["raster"]
    active, pairs = {1: 0, 7: 0}, {1: 0, 7: 0}
    for batch in tokens:
        trace = jax.jit(lambda t: model.traces(t, {}))(batch)[name]
        for image in np.flatnonzero(batch.valid):
            fires = np.asarray(trace.hidden[image] > 0).reshape(trace.hidden.shape[1], -1, 4).any(-1)
            for size in active:
                for first in range(0, len(fires), size):
                    active[size] += fires[first : first + size].any(0).sum()
                    pairs[size] += fires.shape[1]
    for size, count in active.items():
        assert density[size] == pytest.approx(count / pairs[size])
