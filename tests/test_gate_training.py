"""Training gates: what they learn, on which inputs, what stays frozen, and what a kill costs."""

import dataclasses
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from standalone import FFNInputs, StandaloneFFNs
from tiny import TINY_CONFIG, annotation, tiny_detector, tiny_ffn, write_coco

import detr_jax
from detr_jax.calibration.thresholds import calibrate, recall_threshold
from detr_jax.data.batches import CachedBatches, ImageBatches
from detr_jax.data.coco import CocoDataset
from detr_jax.data.features import backbone_features
from detr_jax.errors import InputError
from detr_jax.evaluation.runs import measure_dataset
from detr_jax.methods import METHODS, MGS, DejaVu, LinearGate, LowRankGate, RSparse, Thresholded
from detr_jax.models.ffn import trace
from detr_jax.training import gates as gate_training
from detr_jax.training.gates import GateTraining, train_gates

TRAINING = GateTraining(epochs=20, batch_size=2, group_size=4, learning_rate=0.05)
METHOD = TRAINING.method(MGS)
LABELS = ("mgs", "dejavu", "mgs-contribution", "d2dmoe")
KINDS = {name: TRAINING.method(METHODS[name]) for name in LABELS}


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
def passes(model, dataset):
    return ImageBatches(model, dataset, TRAINING.batch_size, TRAINING.seed)


@pytest.fixture(scope="module")
def embedded(model, dataset):
    return list(backbone_features(model, dataset, TRAINING.batch_size, ""))


@pytest.fixture(scope="module")
def gates(model, passes, tmp_path_factory):
    return train_gates(model, passes, {"mgs": METHOD}, tmp_path_factory.mktemp("run"), silent)["mgs"]


def slow_loss(objective, scores, hidden, w_out, tokens):
    """The docstrings of the methods, token by token and group by group."""
    groups = scores.shape[-1]
    size = hidden.shape[-1] // groups
    entries = []
    for i, t in zip(*np.nonzero(tokens), strict=True):
        for g in range(groups):
            h = hidden[i, t, g * size : (g + 1) * size]
            norm = np.linalg.norm(sum(h[j] * w_out[g * size + j] for j in range(size)))
            entries.append((scores[i, t, g], (h > 0).any(), norm))
    density = np.mean([fires for _, fires, _ in entries])
    unit = sum(norm for *_, norm in entries) / sum(fires for _, fires, _ in entries)
    losses = []
    for score, fires, norm in entries:
        entropy = np.log1p(np.exp(-score if fires else score))
        losses.append(
            {
                "mgs": entropy,
                "dejavu": entropy * (1 if fires else density + 0.005),
                "mgs-contribution": entropy * (norm / unit if fires else 1),
                "d2dmoe": (np.log1p(np.exp(score)) - norm / unit) ** 2,
            }[objective]
        )
    return np.mean(losses)


@pytest.mark.parametrize("objective", LABELS)
def test_losses_are_those_of_loops_over_tokens_that_exist(objective):
    weights, x, tokens = tiny_ffn()
    rng = np.random.default_rng(0)
    gate = LinearGate(jnp.float32(rng.standard_normal((6, 3))), jnp.float32([0.1, -0.2, 0.4]))
    what = trace(weights, x, tokens)
    scores, hidden, w_out = (
        np.asarray(a, np.float64) for a in (x @ gate.kernel + gate.bias, what.hidden, weights.w_out)
    )
    expected = slow_loss(objective, scores, hidden, w_out, np.asarray(tokens))
    assert KINDS[objective].loss(gate, weights, what) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("objective", LABELS)
def test_losses_and_gradients_are_finite_where_nothing_fires_or_nothing_is_left(objective):
    weights, x, tokens = tiny_ffn()
    gate = LinearGate(jnp.ones((6, 3)), jnp.zeros(3))
    silent_weights = weights._replace(b_in=weights.b_in - 1e3)
    # In the second one only padding fires.
    for what in (trace(silent_weights, x, tokens), trace(weights, x, jnp.zeros_like(tokens))):
        found = jax.value_and_grad(lambda g, what=what: KINDS[objective].loss(g, weights, what))(gate)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_gates_give_even_odds_before_they_are_trained():
    weights, x, tokens = tiny_ffn()
    key = jax.random.key(0)
    one, two = METHOD.init((12, 6), key), DejaVu(4, rank=2).init((12, 6), key)
    assert isinstance(one, LinearGate) and isinstance(two, LowRankGate) and two.down.shape == (6, 2)
    for gate in (one, two):
        np.testing.assert_array_equal(gate(weights, x, tokens), np.zeros((*tokens.shape, 3)))
    with pytest.raises(ValueError, match="the rank of a gate must be at least 1, not 0"):
        DejaVu(rank=0)


def test_gates_exist_for_every_ffn_in_the_order_in_which_they_run(gates):
    assert tuple(gates) == TINY_CONFIG.ffn_names
    assert all(gate.kernel.shape == (16, 8) for gate in gates.values())


def test_the_detector_stays_as_it_is(dataset, tmp_path):
    model = tiny_detector()
    before = detr_jax.fingerprint(model)
    train_gates(model, ImageBatches(model, dataset, 2, 0), KINDS, tmp_path, silent)
    assert detr_jax.fingerprint(model) == before


def test_gates_learn_what_fires(model, embedded, gates):
    selectors = {name: Thresholded(gate, jnp.float32(0)) for name, gate in gates.items()}
    initial = measure_dataset(model, embedded, selectors={}, group_size=4).counts
    trained = measure_dataset(model, embedded, selectors=selectors, group_size=4).counts
    base_rates = {name: counts.groups_fired / counts.groups for name, counts in initial.items()}
    undecided = [name for name, rate in base_rates.items() if 0.05 < rate < 0.95]
    assert undecided  # where all groups fire there is nothing to learn
    for name in undecided:
        counts = trained[name]
        wrong = counts.groups_fired + counts.groups_computed - 2 * counts.groups_found
        assert wrong / counts.groups < min(base_rates[name], 1 - base_rates[name])


def test_calibrated_gates_reach_the_recall(model, embedded, passes, gates):
    calibrated = calibrate(model, passes, gates, partial(recall_threshold, recall=0.9))
    for name in TINY_CONFIG.ffn_names:  # one at a time: the others' errors would change its inputs
        counts = measure_dataset(model, embedded, selectors={name: calibrated[name]}, group_size=4).counts[name]
        assert counts.recall >= 0.9


@pytest.fixture(scope="module")
def bare():
    """FFNs that stand alone, and batches of inputs for them in memory."""
    first, second = (tiny_ffn(16, 6, seed=seed)[0] for seed in (0, 1))
    model = StandaloneFFNs({"first": first, "second": second})
    batches = []
    for seed in range(3):
        _, x, tokens = tiny_ffn(16, 6, seed=10 + seed)
        batches.append(FFNInputs({"first": x, "second": x[::-1]}, {"first": tokens, "second": tokens[::-1]}))
    return model, CachedBatches(batches, shuffle_seed=0)


@pytest.fixture(scope="module")
def kinds_in_one_run(bare, tmp_path_factory):
    return train_gates(*bare, KINDS, tmp_path_factory.mktemp("kinds"), silent)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_that_are_trained_together_are_those_trained_alone(bare, kinds_in_one_run, tmp_path, kind):
    (alone,) = train_gates(*bare, {kind: KINDS[kind]}, tmp_path, silent).values()
    together = kinds_in_one_run[kind]
    assert jax.tree.structure(alone) == jax.tree.structure(together)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), together, alone)


def test_every_kind_learns(bare, kinds_in_one_run):
    model, passes = bare
    assert set(kinds_in_one_run) == set(KINDS)
    for kind, gates in kinds_in_one_run.items():
        for name, weights in model.weights.items():
            fresh = KINDS[kind].init((16, 6), jax.random.key(0))
            before, after = (
                np.mean([KINDS[kind].loss(g, weights, model.traces(b, {})[name]) for b in passes.batches()])
                for g in (fresh, gates[name])
            )
            assert after < 0.8 * before


def test_the_loss_that_is_reported_is_the_mean_over_gates(bare, tmp_path):
    model, passes = bare
    losses = []
    once = {name: dataclasses.replace(method, epochs=1) for name, method in KINDS.items()}
    train_gates(model, passes, once, tmp_path, lambda step, loss: losses.append(float(loss)))
    first = next(passes.batches())
    expected = [
        kind.loss(kind.init((16, 6), jax.random.key(0)), weights, model.traces(first, {})[name])
        for kind in KINDS.values()
        for name, weights in model.weights.items()
    ]
    assert len(losses) == len(passes) and losses[0] == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.fixture(scope="module")
def quiet():
    """A detector in which groups are silent for many tokens."""
    model = tiny_detector()
    for ffn in model.ffns.values():
        ffn.b_in[...] -= 0.4
    return model


def running_from(thresholds: dict[str, float]) -> dict[str, Thresholded]:
    """Untrained gates, which give every group the score 0, with thresholds of each FFN."""
    gate = METHOD.init((32, TINY_CONFIG.d_model), jax.random.key(0))
    return {name: Thresholded(gate, jnp.float32(threshold)) for name, threshold in thresholds.items()}


def assert_close(one, other):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), one, other)


def test_gates_that_run_are_trained_on_what_the_earlier_ones_leave(quiet, embedded, tmp_path):
    stored = [batch.tokens for batch in embedded]
    training = dataclasses.replace(METHOD, epochs=5)
    closed = running_from({"encoder.0": np.inf, "decoder.0": -np.inf})
    running = {"open": running_from(dict.fromkeys(TINY_CONFIG.ffn_names, -np.inf)), "closed": closed}
    arguments = (CachedBatches(stored), dict.fromkeys(running, training))
    dense = train_gates(quiet, *arguments, tmp_path / "dense", silent)["open"]
    found = train_gates(quiet, *arguments, tmp_path / "running", silent, active_selectors=running)
    assert_close(found["open"], dense)
    assert_close(found["closed"]["encoder.0"], dense["encoder.0"])
    assert np.abs(found["closed"]["decoder.0"].kernel - dense["decoder.0"].kernel).max() > 0.05

    traces = [quiet.traces(batch, closed)["decoder.0"] for batch in stored]
    left = [FFNInputs({"decoder.0": what.inputs}, {"decoder.0": what.tokens}) for what in traces]
    alone = StandaloneFFNs({"decoder.0": quiet.ffn_weights()["decoder.0"]})
    expected = train_gates(alone, CachedBatches(left), {"mgs": training}, tmp_path / "alone", silent)["mgs"]
    assert_close(found["closed"]["decoder.0"], expected["decoder.0"])


def test_gates_run_as_they_are_while_they_are_trained(quiet, embedded, tmp_path):
    # Untrained gates are below a threshold of 0.5: the third kind is closed at first and opens as it learns.
    thresholds = {"open": -np.inf, "closed": np.inf, "opening": 0.5}
    running = {kind: running_from({"encoder.0": t, "decoder.0": -np.inf}) for kind, t in thresholds.items()}
    passes = CachedBatches([batch.tokens for batch in embedded])
    found = train_gates(quiet, passes, dict.fromkeys(running, METHOD), tmp_path, silent, active_selectors=running)
    assert_close(found["opening"]["encoder.0"], found["closed"]["encoder.0"])
    for other in ("open", "closed"):
        assert np.abs(found["opening"]["decoder.0"].kernel - found[other]["decoder.0"].kernel).max() > 0.01


def test_training_goes_on_from_the_gates_that_run(bare, tmp_path):
    model, passes = bare
    rng = np.random.default_rng(0)
    running = {
        "mgs": {
            name: Thresholded(LinearGate(jnp.float32(rng.standard_normal((6, 4))), jnp.zeros(4)), jnp.float32(0))
            for name in model.weights
        }
    }
    training = dataclasses.replace(METHOD, epochs=1, learning_rate=1e-6)
    found = train_gates(model, passes, {"mgs": training}, tmp_path, silent, active_selectors=running)["mgs"]
    for name, gate in found.items():
        assert 0 < np.abs(gate.kernel - running["mgs"][name].score.kernel).max() < 1e-5


def test_stored_batches_come_in_another_order_in_every_pass():
    passes = CachedBatches(list("abcdefgh"), shuffle_seed=0)
    orders = ["".join(passes.batches(epoch)) for epoch in range(3)]
    assert len(set(orders)) == 3 and all(sorted(order) == list("abcdefgh") for order in orders)
    assert ["".join(passes.batches(epoch, 5)) for epoch in range(3)] == [order[5:] for order in orders]
    assert "".join(CachedBatches(list("abc")).batches(4)) == "abc"


@pytest.mark.parametrize(("stop", "goes_on"), [(1, 1), (8, 8), (50, 50)])
def test_a_run_that_is_stopped_and_resumed_gives_the_same_gates(model, passes, gates, tmp_path, stop, goes_on):
    class Stopped(Exception):
        pass

    def stop_after(step, _):
        if step == stop:
            for _ in range(600):  # checkpoints are written in the background
                if stop < 7 or (tmp_path / str((stop - 1) // 7 * 7)).exists():
                    raise Stopped
                time.sleep(0.1)
            raise TimeoutError

    run = partial(train_gates, model, passes, {"mgs": METHOD}, tmp_path, checkpoint_steps=7)
    with pytest.raises(Stopped):
        run(stop_after)
    steps = []

    def note(step, loss):
        if np.isfinite(loss):
            steps.append(step)

    resumed = run(note)["mgs"]
    assert steps == list(range(goes_on, TRAINING.epochs * len(passes) + 1))
    jax.tree.map(np.testing.assert_array_equal, resumed, gates)


def test_a_finished_run_is_not_trained_again(model, passes, tmp_path):
    arguments = (model, passes, {"mgs": METHOD}, tmp_path)
    first = train_gates(*arguments, silent)
    steps = []
    again = train_gates(*arguments, lambda step, loss: steps.append((step, bool(jnp.isnan(loss)))))
    assert steps == [(TRAINING.epochs * len(passes), True)]
    jax.tree.map(np.testing.assert_array_equal, again, first)


@pytest.mark.parametrize("name", ["group_size", "epochs", "batch_size", "checkpoint_steps"])
def test_counts_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        dataclasses.replace(TRAINING, **{name: 0})
    if hasattr(METHOD, name):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
            dataclasses.replace(METHOD, **{name: 0})


def test_options_of_commands_make_methods_as_far_as_these_have_them():
    assert TRAINING.method(DejaVu) == DejaVu(group_size=4, epochs=20, learning_rate=0.05, rank=16)
    assert TRAINING.method(RSparse) == RSparse()


def test_methods_that_are_trained_together_share_a_recipe(bare, tmp_path):
    methods = {"a": MGS(4, epochs=1), "b": MGS(4, epochs=2)}
    with pytest.raises(InputError, match="must share epochs, learning rate and seed"):
        train_gates(*bare, methods, tmp_path, silent)


def test_training_again_compiles_nothing(bare, tmp_path):
    train_gates(*bare, {"mgs": MGS(4, epochs=1)}, tmp_path / "a", silent)
    programs = gate_training._take_step._cache_size()
    train_gates(*bare, {"mgs": MGS(4, epochs=1)}, tmp_path / "b", silent)
    assert gate_training._take_step._cache_size() == programs
