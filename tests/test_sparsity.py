"""Gates, what they are measured by, and their thresholds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY_CONFIG, tiny_detector

from detr_jax.model import FFNTrace
from detr_jax.sparsity.calibration import firing_histogram, recall_thresholds
from detr_jax.sparsity.gates import LinearGate, initial_gates, with_thresholds
from detr_jax.sparsity.grouping import firing_groups, group_count
from detr_jax.sparsity.statistics import count_firing, total_counts

BATCH, TOKENS, D, GROUPS, SIZE = 2, 7, 4, 3, 5


def example_trace(seed=0) -> tuple[FFNTrace, np.ndarray]:
    """A trace with padding tokens, and which images of its batch are valid."""
    rng = np.random.default_rng(seed)
    hidden = np.maximum(rng.normal(-1, 1, (BATCH, TOKENS, GROUPS * SIZE)), 0).astype(np.float32)
    inputs = rng.standard_normal((BATCH, TOKENS, D)).astype(np.float32)
    tokens = np.arange(TOKENS) < np.array([[TOKENS], [TOKENS - 3]])
    return FFNTrace(jnp.asarray(inputs), jnp.asarray(hidden), jnp.asarray(tokens)), np.ones(BATCH, bool)


def example_gate(threshold=0.5, seed=1) -> LinearGate:
    rng = np.random.default_rng(seed)
    kernel, bias = rng.standard_normal((D, GROUPS)), rng.standard_normal(GROUPS)
    return LinearGate(jnp.float32(kernel), jnp.float32(bias), jnp.float32(threshold))


def test_a_group_fires_when_one_of_its_neurons_does():
    hidden = jnp.array([[0.0, 0.0, 1e-30, 0.0, 0.0, 2.0]])
    np.testing.assert_array_equal(firing_groups(hidden, 3), [[False, True, True]])
    np.testing.assert_array_equal(firing_groups(hidden, 2), [[True, True]])
    np.testing.assert_array_equal(firing_groups(hidden * 0, 2), [[False, False]])


@pytest.mark.parametrize("size", [0, -1, 7])
def test_group_sizes_that_do_not_divide_are_refused(size):
    with pytest.raises(ValueError, match=f"32 hidden neurons cannot be divided into groups of {size}"):
        group_count(32, size)


def test_a_gate_keeps_the_groups_that_reach_its_threshold():
    gate = LinearGate(jnp.array([[1.0, -1.0]]), jnp.zeros(2), jnp.float32(0.5))
    np.testing.assert_array_equal(gate(jnp.array([[2.0], [-2.0], [0.0]])), [[1, 0], [0, 1], [1, 1]])
    stricter = dataclasses.replace(gate, threshold=jnp.float32(0.9))
    np.testing.assert_array_equal(stricter(jnp.array([[2.0], [3.0]])), [[0, 0], [1, 0]])


def test_thresholds_must_be_probabilities():
    with pytest.raises(ValueError, match=r"threshold of a must be a probability, not 1\.5"):
        with_thresholds({"a": example_gate()}, {"a": 1.5})


def test_open_gates_change_nothing_and_closed_gates_leave_the_bias():
    model = tiny_detector()
    images = np.random.default_rng(0).standard_normal((1, 32, 40, 3)).astype(np.float32)
    gates = initial_gates(model.config, 8)
    run = jax.jit(lambda selectors: model(images, selectors=selectors).logits)
    dense = model(images).logits
    np.testing.assert_allclose(run(with_thresholds(gates, dict.fromkeys(gates, 0.0))), dense, atol=1e-5)
    closed = run(with_thresholds(gates, dict.fromkeys(gates, 1.0)))
    assert np.abs(closed - dense).max() > 1e-3
    for layer in (*model.transformer.encoder, *model.transformer.decoder):
        layer.ffn.w_out[...] = jnp.zeros_like(layer.ffn.w_out[...])
    np.testing.assert_allclose(model(images).logits, closed, atol=1e-5)


def test_counts_are_those_of_a_loop():
    trace, _ = example_trace()
    valid = np.array([False, True])
    gate = example_gate()
    counts = total_counts([{"f": count_firing(trace, valid, {"f": gate}, "f", SIZE)}] * 2)["f"]
    kept = np.asarray(gate(trace.inputs))
    expected = dict.fromkeys(dataclasses.asdict(counts), 0)
    for t in range(TOKENS):
        if not trace.tokens[1, t]:
            continue
        for g in range(GROUPS):
            members = np.asarray(trace.hidden[1, t, g * SIZE : (g + 1) * SIZE]) > 0
            expected["neurons"] += SIZE
            expected["neurons_fired"] += members.sum()
            expected["neurons_left"] += members.sum() * kept[1, t, g]
            expected["groups"] += 1
            expected["groups_fired"] += members.any()
            expected["groups_computed"] += kept[1, t, g]
            expected["groups_found"] += members.any() and kept[1, t, g]
    assert dataclasses.asdict(counts) == {name: 2 * value for name, value in expected.items()}
    assert counts.recall == expected["groups_found"] / expected["groups_fired"]
    assert counts.group_sparsity == 1 - expected["groups_computed"] / expected["groups"]


def test_a_dense_ffn_computes_every_group():
    trace, valid = example_trace()
    counts = total_counts([{"f": count_firing(trace, valid, {}, "f", SIZE)}])["f"]
    assert counts.group_sparsity == 0 and counts.recall == 1
    assert counts.zeros == counts.neuron_sparsity > 0.5


@pytest.mark.parametrize("recall", [0.5, 0.9, 1.0])
def test_thresholds_reach_the_recall_and_the_next_ones_do_not(recall):
    traces = [example_trace(seed) for seed in range(20)]
    gate = example_gate()
    thresholds = recall_thresholds(({"f": firing_histogram(gate, *trace)} for trace in traces), recall)

    def reached(threshold):
        calibrated = {"f": dataclasses.replace(gate, threshold=jnp.float32(threshold))}
        return total_counts({"f": count_firing(t, valid, calibrated, "f", SIZE)} for t, valid in traces)["f"].recall

    assert reached(thresholds["f"]) >= recall
    logit = np.log(thresholds["f"] / (1 - thresholds["f"]))
    assert reached(1 / (1 + np.exp(-logit - 0.5))) < recall


def test_a_gate_that_is_surely_wrong_gets_an_open_threshold():
    trace, valid = example_trace()
    hopeless = LinearGate(jnp.zeros((D, GROUPS)), jnp.full(GROUPS, -50.0), jnp.float32(0.5))
    assert recall_thresholds([{"f": firing_histogram(hopeless, trace, valid)}], 0.9) == {"f": 0.0}


@pytest.mark.parametrize("recall", [-0.1, 1.1, float("nan")])
def test_a_recall_must_be_a_share(recall):
    with pytest.raises(ValueError, match="recall must be between 0 and 1"):
        recall_thresholds([], recall)


def test_calibration_needs_images():
    with pytest.raises(ValueError, match="no images"):
        recall_thresholds([], 0.9)


def test_gates_exist_for_every_ffn():
    assert tuple(initial_gates(TINY_CONFIG, 8)) == TINY_CONFIG.ffn_names
