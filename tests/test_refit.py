"""Moments, fixed sets with a fitted second layer, and the order in which neurons are eliminated."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from standalone import FFNInputs, StandaloneFFNs
from tiny import tiny_ffn

from detr_jax.calibration.moments import Moments, measure_moments, moments_of
from detr_jax.data.batches import CachedBatches
from detr_jax.kernels import ffn
from detr_jax.methods import Fixed
from detr_jax.methods.reconstruction import eliminate, obs_ranking, reconstruct_output
from detr_jax.models.ffn import forward, trace

WEIGHTS, X, TOKENS = tiny_ffn(12, 6, images=60)
HIDDEN = np.asarray(trace(WEIGHTS, X, TOKENS).hidden, np.float64)[np.asarray(TOKENS)]
MOMENTS = moments_of(jnp.asarray(trace(WEIGHTS, X, TOKENS).hidden), TOKENS)


def error(kept: np.ndarray, second=None) -> float:
    """Mean squared error of the output with some neurons, over the tokens that the moments were measured on."""
    selection = Fixed(jnp.asarray(kept), second)(WEIGHTS, X, TOKENS)
    rest = np.asarray(forward(WEIGHTS, X, selection) - ffn(X, *WEIGHTS), np.float64)[np.asarray(TOKENS)]
    return float((rest**2).sum(-1).mean())


def test_moments_add_up_and_leave_padding_out():
    parts = [moments_of(trace(WEIGHTS, x, t).hidden, t) for x, t in ((X[:7], TOKENS[:7]), (X[7:], TOKENS[7:]))]
    total = parts[0] + parts[1]
    assert total.products.dtype == np.float64 and total.tokens == TOKENS.sum()
    np.testing.assert_allclose(total.mean, HIDDEN.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total.covariance, np.cov(HIDDEN.T, bias=True), rtol=1e-4, atol=1e-5)


def test_moments_of_a_pass():
    batches = [FFNInputs({"f": X[i : i + 20]}, {"f": TOKENS[i : i + 20]}) for i in (0, 20, 40)]
    inputs, hidden = measure_moments(StandaloneFFNs({"f": WEIGHTS}), CachedBatches(batches))
    np.testing.assert_allclose(inputs["f"].mean, np.asarray(X)[np.asarray(TOKENS)].mean(0), atol=1e-5)
    np.testing.assert_allclose(hidden["f"].covariance, MOMENTS.covariance, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no images to measure moments on"):
        measure_moments(StandaloneFFNs({"f": WEIGHTS}), CachedBatches([]))


def test_a_refitted_layer_is_the_least_squares_fit():
    kept = np.arange(12) % 2 == 0
    second = reconstruct_output(WEIGHTS, MOMENTS, kept)
    targets = HIDDEN @ np.asarray(WEIGHTS.w_out, np.float64)
    design = np.concatenate([HIDDEN[:, kept], np.ones((len(HIDDEN), 1))], axis=1)
    best, *_ = np.linalg.lstsq(design, targets)
    least = ((design @ best - targets) ** 2).sum(-1).mean()
    assert not np.asarray(second.w_out)[~kept].any()
    assert error(kept, second) == pytest.approx(least, rel=1e-2)
    assert error(kept, second) < 0.8 * error(kept)


def test_all_neurons_need_no_fit():
    second = reconstruct_output(WEIGHTS, MOMENTS, np.ones(12, bool))
    np.testing.assert_allclose(second.w_out, WEIGHTS.w_out, atol=1e-6)
    np.testing.assert_allclose(second.b_out, WEIGHTS.b_out, atol=1e-5)


def test_without_neurons_the_mean_output_is_left():
    second = reconstruct_output(WEIGHTS, MOMENTS, np.zeros(12, bool))
    expected = np.asarray(ffn(X, *WEIGHTS))[np.asarray(TOKENS)].mean(0)
    np.testing.assert_allclose(second.b_out, expected, atol=1e-4)


def test_elimination_takes_the_neuron_that_costs_least_each_time():
    order = obs_ranking(WEIGHTS, MOMENTS)
    assert sorted(order) == list(range(12))
    kept = np.ones(12, bool)
    for out in order[:4:-1]:
        costs = {}
        for other in np.flatnonzero(kept):
            trial = kept.copy()
            trial[other] = False
            costs[other] = error(trial, reconstruct_output(WEIGHTS, MOMENTS, trial))
        assert costs[out] <= min(costs.values()) * 1.02 + 1e-6
        kept[out] = False


def test_elimination_finds_sets_about_as_good_as_the_best_one():
    order = obs_ranking(WEIGHTS, MOMENTS)

    def of(neurons) -> float:
        kept = np.isin(np.arange(12), neurons)
        return error(kept, reconstruct_output(WEIGHTS, MOMENTS, kept))

    best = min(of(neurons) for neurons in itertools.combinations(range(12), 2))
    assert of(order[:2]) <= 1.2 * best


def test_elimination_survives_moments_that_rounding_spoiled():
    # Few directions, and lower eigenvalues as rounding leaves them where means are far above deviations.
    rng = np.random.default_rng(3)
    directions, _ = np.linalg.qr(rng.standard_normal((12, 12)))
    eigenvalues = np.array([1.0, 0.1, 1e-2, 6e-3, -2e-3, -1e-3, -5e-4, *[1e-9] * 5])
    rows = rng.standard_normal((12, 6))
    order, costs = eliminate(directions * eigenvalues @ directions.T, rows)
    assert sorted(order) == list(range(12))
    total = np.trace(rows.T @ (directions * np.maximum(eigenvalues, 0)) @ directions.T @ rows)
    assert np.isfinite(costs).all() and costs.max() <= 2 * total


def test_neurons_that_never_fire_go_first():
    silent = WEIGHTS._replace(b_in=WEIGHTS.b_in.at[jnp.array([3, 8])].set(-1e3))
    order = obs_ranking(silent, moments_of(trace(silent, X, TOKENS).hidden, TOKENS))
    assert set(order[-2:]) == {3, 8}
    nothing = Moments(jnp.int32(0), jnp.zeros(12), jnp.zeros((12, 12)))
    assert sorted(obs_ranking(WEIGHTS, nothing)) == list(range(12))
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(reconstruct_output(WEIGHTS, nothing, np.arange(12) < 3)))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"moments of \(6,\) activations do not fit 12 neurons"):
        reconstruct_output(WEIGHTS, moments_of(X, TOKENS), np.ones(12, bool))
    with pytest.raises(ValueError, match="a bool for each, not bool \\(4,\\)"):
        reconstruct_output(WEIGHTS, MOMENTS, np.ones(4, bool))
