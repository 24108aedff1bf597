"""Training gates: what they learn, what stays frozen, and what a kill costs."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import TINY_CONFIG, annotation, tiny_detector, write_coco

import detr_jax
from detr_jax.data.coco import CocoDataset
from detr_jax.evaluation.detections import measure_dataset
from detr_jax.model import FFNTrace
from detr_jax.sparsity.gates import LinearGate
from detr_jax.training.gates import GateTraining, calibrate_gates, gate_loss, train_gates, training_steps

TRAINING = GateTraining(epochs=20, batch_size=2, group_size=4, checkpoint_steps=7, learning_rate=0.05)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    sizes = [(32, 40)] * 4 + [(40, 32)] * 3
    return CocoDataset(write_coco(root, sizes, [annotation(1, 1, (2, 2, 9, 9))]), "val2017")


@pytest.fixture(scope="module")
def model():
    return tiny_detector()


def silent(*_):
    pass


@pytest.fixture(scope="module")
def gates(model, dataset, tmp_path_factory):
    return train_gates(model, dataset, TRAINING, tmp_path_factory.mktemp("run"), silent)


def test_the_loss_is_cross_entropy_over_tokens_that_exist():
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((2, 3, 4)).astype(np.float32)
    hidden = np.maximum(rng.standard_normal((2, 3, 6)), 0).astype(np.float32)
    tokens = np.array([[True, True, False], [True, True, True]])
    gate = LinearGate(rng.standard_normal((4, 2)).astype(np.float32), np.float32([0.1, -0.2]), np.float32(0.5))
    loss = gate_loss(gate, FFNTrace(inputs, hidden, tokens), np.array([True, False]))
    logits = inputs[0, :2] @ gate.kernel + gate.bias
    fires = np.stack([hidden[0, :2, :3].any(-1), hidden[0, :2, 3:].any(-1)], -1)
    np.testing.assert_allclose(loss, optax.sigmoid_binary_cross_entropy(logits, fires).mean(), rtol=1e-6)


def test_the_detector_stays_as_it_is(dataset, tmp_path):
    model = tiny_detector()
    before = detr_jax.fingerprint(model)
    train_gates(model, dataset, TRAINING, tmp_path, silent)
    assert detr_jax.fingerprint(model) == before


def test_gates_learn_what_fires(model, dataset, gates):
    initial = measure_dataset(model, dataset, 2, selectors={}, group_size=4, progress="").counts
    trained = measure_dataset(model, dataset, 2, selectors=gates, group_size=4, progress="").counts
    base_rates = {name: counts.groups_fired / counts.groups for name, counts in initial.items()}
    undecided = [name for name, rate in base_rates.items() if 0.05 < rate < 0.95]
    assert undecided  # where all groups fire there is nothing to learn
    for name in undecided:
        counts = trained[name]
        wrong = counts.groups_fired + counts.groups_computed - 2 * counts.groups_found
        assert wrong / counts.groups < min(base_rates[name], 1 - base_rates[name])


def test_calibrated_gates_reach_the_recall(model, dataset, gates):
    calibrated = calibrate_gates(model, gates, dataset, 2, 0.9, silent)
    for name in TINY_CONFIG.ffn_names:  # one at a time: the others' errors would change its inputs
        counts = measure_dataset(
            model, dataset, 2, selectors={name: calibrated[name]}, group_size=4, progress=""
        ).counts[name]
        assert counts.recall >= 0.9


@pytest.mark.parametrize(("stop", "goes_on"), [(1, 1), (8, 8), (50, 50)])
def test_a_run_that_is_stopped_and_resumed_gives_the_same_gates(model, dataset, gates, tmp_path, stop, goes_on):
    class Stopped(Exception):
        pass

    def stop_after(step, _):
        if step == stop:
            for _ in range(600):  # checkpoints are written in the background
                if stop < 7 or (tmp_path / str((stop - 1) // 7 * 7)).exists():
                    raise Stopped
                time.sleep(0.1)
            raise TimeoutError

    with pytest.raises(Stopped):
        train_gates(model, dataset, TRAINING, tmp_path, stop_after)
    steps = []
    resumed = train_gates(
        model, dataset, TRAINING, tmp_path, lambda step, loss: steps.append(step) if np.isfinite(loss) else None
    )
    assert steps == list(range(goes_on, training_steps(model, dataset, TRAINING) + 1))
    jax.tree.map(np.testing.assert_array_equal, resumed, gates)


def test_a_finished_run_is_not_trained_again(model, dataset, tmp_path):
    first = train_gates(model, dataset, TRAINING, tmp_path, silent)
    steps = []
    again = train_gates(
        model, dataset, TRAINING, tmp_path, lambda step, loss: steps.append((step, bool(jnp.isnan(loss))))
    )
    assert steps == [(training_steps(model, dataset, TRAINING), True)]
    jax.tree.map(np.testing.assert_array_equal, again, first)


@pytest.mark.parametrize("name", ["group_size", "epochs", "batch_size", "checkpoint_steps"])
def test_counts_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        dataclasses.replace(TRAINING, **{name: 0})
