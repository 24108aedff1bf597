"""Training gates to a budget: gradients of hard gates, budgets that are met, what stays frozen, what a kill costs."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY_CONFIG, annotation, tiny_detector, tiny_ffn, write_coco

import detr_jax
from detr_jax.data.batches import CachedBatches
from detr_jax.data.coco import CocoDataset
from detr_jax.data.features import backbone_features
from detr_jax.kernels import Execution
from detr_jax.methods import Executed, LinearGate, Pooled, Thresholded
from detr_jax.methods.tiles import count_tiles
from detr_jax.models.ffn import forward
from detr_jax.training import budgets
from detr_jax.training.budgets import (
    Density,
    DensityPerFFN,
    GateTuning,
    MaxDivergence,
    Recall,
    measure,
    meet,
    tune_gates,
)
from detr_jax.training.straight_through import StraightThrough, mean_density

TUNING = GateTuning(epochs=60, learning_rate=0.01)
NAMES = TINY_CONFIG.ffn_names


def silent(*_):
    pass


def quiet_detector() -> detr_jax.DETR:
    """A detector in which groups are silent for many tokens, and all that fire say the same: each one counts."""
    model = tiny_detector()
    for ffn in model.ffns.values():
        ffn.b_in[...] -= 0.4
        ffn.w_out[...] = jnp.abs(ffn.w_out[...][:, :1]) * ffn.w_out[...][0]
    return model


@pytest.fixture(scope="module")
def model():
    return quiet_detector()


@pytest.fixture(scope="module")
def batches(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    dataset = CocoDataset(write_coco(root, [(32, 40)] * 7, [annotation(1, 1, (2, 2, 9, 9))]), "val2017")
    return [batch.tokens for batch in backbone_features(model, dataset, 2, "")]


@pytest.fixture(scope="module")
def passes(batches):
    return CachedBatches(batches, shuffle_seed=0)


def random_selectors(seed: int = 0) -> dict[str, Thresholded]:
    """Gates of four neurons that know nothing, half open."""
    rng = np.random.default_rng(seed)
    return {
        name: Thresholded(LinearGate(jnp.float32(rng.standard_normal((16, 8))), jnp.zeros(8)), jnp.float32(0))
        for name in NAMES
    }


def test_hard_gates_have_the_gradient_of_their_probabilities():
    weights, x, tokens = tiny_ffn()
    rng = np.random.default_rng(1)
    gate = LinearGate(jnp.float32(rng.standard_normal((6, 3))), jnp.float32([0.1, -0.2, 0.4]))
    selector = Thresholded(gate, jnp.float32(0.3))
    dispatch_ahead = jnp.float32(rng.standard_normal(x.shape))  # the gradient that arrives at the FFN's output

    def run(selector):
        return (forward(weights, x, StraightThrough(selector)(weights, x, tokens)) * dispatch_ahead).sum()

    found = jax.grad(run)(selector)
    logits = np.asarray(x @ gate.kernel + gate.bias - 0.3, np.float64)
    probabilities = 1 / (1 + np.exp(-logits))
    hidden = np.maximum(np.asarray(x) @ np.asarray(weights.w_in).T + weights.b_in, 0)
    worth = (hidden * (np.asarray(dispatch_ahead) @ np.asarray(weights.w_out).T)).reshape(*tokens.shape, 3, 4).sum(-1)
    expected = np.where(tokens[..., None], worth * probabilities * (1 - probabilities), 0)
    np.testing.assert_allclose(found.score.bias, expected.sum((0, 1)), rtol=1e-4)
    np.testing.assert_allclose(found.score.kernel, np.einsum("bti,btg->ig", x, expected), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.threshold, -expected.sum(), rtol=1e-4)


@pytest.mark.parametrize("tile_size", [1, 4])
def test_hard_gates_compute_what_the_sparse_operation_computes(tile_size):
    weights, x, tokens = tiny_ffn()
    gate = LinearGate(jnp.float32(np.random.default_rng(1).standard_normal((6, 3))), jnp.zeros(3))
    selector = Thresholded(gate, jnp.float32(0.3))
    executed = Executed(selector, Execution(tile_size, block_size=4, implementation="xla"))
    hard, sparse = (
        forward(weights, x, s(weights, x, tokens)) for s in (StraightThrough(selector, tile_size=tile_size), executed)
    )
    np.testing.assert_allclose(hard[tokens], sparse[tokens], rtol=1e-5, atol=1e-5)


def test_tokens_of_a_window_share_a_draw_and_draws_follow_the_probabilities():
    weights, _, _ = tiny_ffn()
    x, tokens = jnp.zeros((500, 8, 6)), jnp.ones((500, 8), bool)
    gate = Pooled(LinearGate(jnp.zeros((6, 3)), jnp.float32([-2, 0, 1])), odds=False, window=4)
    mask = np.asarray(StraightThrough(Thresholded(gate, jnp.float32(0.5)), jax.random.key(0))(weights, x, tokens).mask)
    assert set(np.unique(mask)) == {0, 1}
    tiles = mask.reshape(500, 2, 4, 3)
    np.testing.assert_array_equal(tiles, np.broadcast_to(tiles[:, :, :1], tiles.shape))
    np.testing.assert_allclose(tiles[:, :, 0].mean((0, 1)), 1 / (1 + np.exp([2.5, 0.5, -0.5])), atol=0.05)


def test_densities_are_those_of_tokens_with_the_gradient_of_probabilities():
    _, _, tokens = tiny_ffn()
    logits = np.random.default_rng(2).normal(-1.5, 1, (*tokens.shape, 3)).astype(np.float32)
    value, gradient = jax.value_and_grad(mean_density)(jnp.asarray(logits), tokens)
    counts = count_tiles(jnp.asarray(logits >= 0), tokens, 1)
    assert 0.05 < value < 0.95
    assert value == pytest.approx(counts.density, rel=1e-6)
    probabilities = np.where(tokens[..., None], 1 / (1 + np.exp(-logits.astype(np.float64))), 0)
    expected = probabilities * (1 - probabilities) / int(counts.pairs)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("threshold", [-np.inf, np.inf])
def test_gates_that_are_always_open_or_never_have_no_gradient(threshold):
    weights, x, tokens = tiny_ffn()
    selector = Thresholded(LinearGate(jnp.ones((6, 3)), jnp.zeros(3)), jnp.float32(threshold))

    def run(selector):
        hard = StraightThrough(selector)
        density = mean_density(hard.logits(weights, x, tokens), tokens)
        return forward(weights, x, hard(weights, x, tokens)).sum() + density

    for leaf in jax.tree.leaves(jax.grad(run)(selector)):
        np.testing.assert_array_equal(leaf, jnp.zeros_like(leaf))


@pytest.mark.parametrize(("budget", "tile_size"), [(DensityPerFFN({"encoder.0": 0.4}), 1), (Density(0.6), 4)])
def test_training_reaches_the_density_and_calibration_meets_it(model, passes, budget, tile_size, tmp_path):
    start = {"encoder.0": random_selectors()["encoder.0"]}
    tuned = tune_gates(model, passes, start, budget, TUNING, tmp_path, silent)
    asked = budget.density if isinstance(budget, Density) else budget.densities["encoder.0"]
    met = meet(model, passes, tuned, budget, tile_size)
    (before, _), (_, trained), (change, densities) = (measure(model, passes, s, tile_size) for s in (start, tuned, met))
    assert abs(trained["encoder.0"] - asked) < 0.03
    assert asked - 0.01 < densities["encoder.0"] <= asked
    assert change < before  # although the start is denser


@pytest.fixture(scope="module")
def wide():
    """A budget that takes a few steps, for what does not depend on its being met."""
    return Density(0.4), dataclasses.replace(TUNING, epochs=5, learning_rate=1e-3, checkpoint_steps=7)


@pytest.fixture(scope="module")
def tuned(model, passes, wide, tmp_path_factory):
    return tune_gates(model, passes, random_selectors(), *wide, tmp_path_factory.mktemp("whole"), silent)


def test_the_least_density_is_within_the_bound_and_below_that_of_untrained_gates(model, passes, tmp_path):
    start = random_selectors()
    unlike, _ = measure(model, passes, start)
    budget = MaxDivergence(0.3 * unlike)
    calibrated = meet(model, passes, start, budget)
    trained = meet(model, passes, tune_gates(model, passes, calibrated, budget, TUNING, tmp_path, silent), budget)
    (_, before), (change, after) = (measure(model, passes, selectors) for selectors in (calibrated, trained))
    assert 0.8 * budget.divergence < change <= budget.divergence
    assert sum(after.values()) < 0.9 * sum(before.values())


def test_the_detector_stays_as_it_is_and_all_parts_of_the_gates_change(model, tuned):
    assert detr_jax.fingerprint(model) == detr_jax.fingerprint(quiet_detector())
    assert tuple(tuned) == NAMES
    for old, new in zip(jax.tree.leaves(random_selectors()), jax.tree.leaves(tuned), strict=True):
        assert 0 < np.abs(old - new).max() < 0.1


def test_a_run_that_is_stopped_and_resumed_gives_the_same_gates(model, passes, wide, tuned, tmp_path):
    class Stopped(Exception):
        pass

    def stop_after(step, _):
        if step == 9:
            for _ in range(600):  # checkpoints are written in the background
                if (tmp_path / "7").exists():
                    raise Stopped
                time.sleep(0.1)
            raise TimeoutError

    with pytest.raises(Stopped):
        tune_gates(model, passes, random_selectors(), *wide, tmp_path, stop_after)
    steps = []

    def note(step, progress):
        if progress is not None:
            steps.append(step)

    resumed = tune_gates(model, passes, random_selectors(), *wide, tmp_path, note)
    assert steps == list(range(8, 5 * len(passes) + 1))
    jax.tree.map(np.testing.assert_array_equal, resumed, tuned)


@pytest.mark.parametrize("loss", ["divergence", "mgs-contribution"])
def test_batches_of_padding_alone_change_nothing(model, batches, tmp_path, loss):
    empty = dataclasses.replace(batches[0], valid=np.zeros_like(batches[0].valid))
    start = random_selectors()
    tuning = dataclasses.replace(TUNING, loss=loss, epochs=3)
    found = []
    budget = DensityPerFFN(dict.fromkeys(NAMES, 0.3))
    end = tune_gates(model, CachedBatches([empty]), start, budget, tuning, tmp_path, lambda _, p: found.append(p))
    jax.tree.map(np.testing.assert_array_equal, end, start)
    assert len(found) == 3
    for progress in found:
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(progress))


def test_labels_and_a_bound_on_the_change_are_refused_together(model, passes, tmp_path):
    tuning = dataclasses.replace(TUNING, loss="mgs")
    with pytest.raises(ValueError, match="a bound on the divergence of the outputs needs that as the loss, not 'mgs'"):
        tune_gates(model, passes, random_selectors(), MaxDivergence(0.1), tuning, tmp_path, silent)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Density(0.0), "a density must be above 0 and at most 1, not 0.0"),
        (lambda: DensityPerFFN({"encoder.0": 1.5}), "a density must be above 0 and at most 1, not 1.5"),
        (lambda: MaxDivergence(float("nan")), "must be above 0, not nan"),
        (lambda: Recall(1.5), "a recall must be between 0 and 1, not 1.5"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_training_to_a_budget_again_compiles_nothing(model, batches, tmp_path):
    few, tuning = CachedBatches(batches[:1]), dataclasses.replace(TUNING, epochs=1)
    programs = []
    for folder in ("a", "b"):
        tune_gates(model, few, random_selectors(), Density(0.3), tuning, tmp_path / folder, silent)
        programs.append(budgets._take_step._cache_size())
    assert programs[0] == programs[1]
