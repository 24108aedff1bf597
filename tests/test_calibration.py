"""Thresholds: histograms of scores, the density or recall they are chosen for, and calibration passes."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from standalone import FFNInputs, StandaloneFFNs
from tiny import TINY_CONFIG, tiny_detector, tiny_ffn

from detr_jax.calibration.accumulate import add_by_name
from detr_jax.calibration.thresholds import (
    ScoreHistogram,
    calibrate,
    density_threshold,
    measure_scores,
    recall_threshold,
    score_histogram,
)
from detr_jax.data.batches import CachedBatches
from detr_jax.evaluation.counts import ActivityCounts, count_activity, total_counts
from detr_jax.methods import Importance, InputMagnitude, LinearGate, Pooled, Thresholded
from detr_jax.methods.grouping import active_groups
from detr_jax.methods.tiles import count_tiles
from detr_jax.models import FFNTrace, Selection
from detr_jax.models.ffn import trace

RESOLUTION = 2.0**-9
"""Scores closer than this, relatively, may share a bin."""


def histogram_of(scores: np.ndarray, fires: np.ndarray | None = None) -> ScoreHistogram:
    """Of given scores, as those of the groups of one token."""
    score = Importance(jnp.asarray(scores, jnp.float32).ravel())
    fires = np.zeros(scores.shape) if fires is None else fires
    hidden = jnp.asarray(fires, jnp.float32).reshape(1, 1, -1)
    return score_histogram(score, None, FFNTrace(jnp.zeros((1, 1, 1)), hidden, jnp.ones((1, 1), bool), Selection()))


def random_scores(tokens=50, groups=8, seed=0) -> np.ndarray:
    """Of every size and sign, with zeros of both signs."""
    rng = np.random.default_rng(seed)
    scores = rng.choice([-1, 1], (tokens, groups)) * 10.0 ** rng.uniform(-37, 38, (tokens, groups))
    scores[:, 0] = rng.standard_normal(tokens)
    scores[:5, 1], scores[5:9, 1] = 0.0, -0.0
    scores[10:14, 1] = [3.4e38, -3.4e38, 1.2e-38, -1.2e-38]
    return scores.astype(np.float32)


def count(selector, weights, traces, group_size: int) -> ActivityCounts:
    def counts():
        for what in traces:
            yield {"f": count_activity(trace(weights, what.inputs, what.tokens, selector), group_size)}

    return total_counts(counts())["f"]


@pytest.mark.parametrize("density", [0.0, 0.003, 0.1, 0.33, 0.5, 0.52, 0.77, 0.999])
def test_a_density_is_kept_and_the_next_lower_score_would_exceed_it(density):
    scores = random_scores()
    threshold = np.float32(density_threshold(histogram_of(scores), density))
    kept = scores >= threshold
    assert kept.mean() <= density
    below = scores[~kept].max().astype(np.float64)
    assert (scores >= below - RESOLUTION * abs(below)).mean() > density


def test_all_scores_are_kept_where_the_density_is_one():
    assert density_threshold(histogram_of(random_scores()), 1) == -np.inf


def test_few_different_scores_are_told_apart_exactly():
    scores = np.array([[-2.0, -1.0, -0.0, 0.0, 1e-30, 0.5, 0.502, 7.0]] * 3)  # two of them are equal
    for density, keeps in ((0, 0), (0.12, 0), (0.125, 1), (0.3, 2), (0.4, 3), (0.65, 4), (0.75, 6), (0.99, 7), (1, 8)):
        threshold = density_threshold(histogram_of(scores), density)
        assert (scores[0] >= threshold).sum() == keeps


def test_histograms_count_tokens_that_exist_and_groups_that_fire():
    weights, x, tokens = tiny_ffn()
    what = trace(weights, x, tokens)
    importance = np.array([0.5, 3.0, 1.0], np.float32)
    histogram = score_histogram(Importance(jnp.asarray(importance)), weights, what)
    fires = (np.asarray(what.hidden).reshape(*tokens.shape, 3, 4) > 0).any(-1) & np.asarray(tokens)[..., None]
    populated = np.flatnonzero(histogram.all)
    np.testing.assert_array_equal(histogram.all[populated], [tokens.sum()] * 3)
    np.testing.assert_array_equal(histogram.firing[populated], fires.sum((0, 1))[np.argsort(importance)])
    assert histogram.firing.sum() == fires.sum()


@pytest.mark.parametrize("tile_size", [2, 4, 20])
def test_thresholds_of_tiles_keep_a_share_of_the_tiles(tile_size):
    rng = np.random.default_rng(1)
    gate = LinearGate(jnp.float32(rng.standard_normal((6, 3))), jnp.float32(rng.standard_normal(3)))
    weights, _, _ = tiny_ffn()
    traces = [trace(weights, *tiny_ffn(seed=seed)[1:]) for seed in range(20)]
    total = reduce(add_by_name, ({"f": score_histogram(gate, weights, what, tile_size)} for what in traces))["f"]
    fires = [count_tiles(active_groups(what.hidden, 3), what.tokens, tile_size) for what in traces]
    assert (total.all.sum(), total.firing.sum()) == tuple(
        sum(getattr(c, f) for c in fires) for f in ("pairs", "active")
    )
    chosen = Thresholded(gate, jnp.float32(density_threshold(total, 0.4)))
    selected = [chosen(weights, what.inputs, what.tokens).active for what in traces]
    counts = [count_tiles(active, what.tokens, tile_size) for active, what in zip(selected, traces, strict=True)]
    assert 0.37 < sum(counts[1:], counts[0]).density <= 0.4


@pytest.mark.parametrize("recall", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_a_recall_is_reached_and_the_next_higher_score_would_miss_it(recall):
    scores = random_scores()
    fires = np.random.default_rng(1).random(scores.shape) < 0.3
    threshold = np.float32(recall_threshold(histogram_of(scores, fires), recall))
    found = scores[fires] >= threshold
    assert found.mean() >= recall
    at_threshold = scores[fires][found].min().astype(np.float64)
    higher = scores[fires] > at_threshold + RESOLUTION * abs(at_threshold)
    assert not higher.any() or higher.mean() < recall


@pytest.mark.parametrize("recall", [0.5, 0.9, 1.0])
def test_thresholds_reach_the_recall_and_stricter_ones_do_not(recall):
    rng = np.random.default_rng(1)
    gate = LinearGate(jnp.float32(rng.standard_normal((6, 3))), jnp.float32(rng.standard_normal(3)))
    weights, _, _ = tiny_ffn()
    traces = [trace(weights, *tiny_ffn(seed=seed)[1:]) for seed in range(20)]
    total = reduce(add_by_name, ({"f": score_histogram(gate, weights, what)} for what in traces))["f"]
    calibrated = Thresholded(gate, jnp.float32(recall_threshold(total, recall)))
    assert count(calibrated, weights, traces, 4).recall >= recall
    assert count(calibrated.at(calibrated.threshold + 0.1), weights, traces, 4).recall < recall


def test_a_gate_that_is_surely_wrong_gets_a_threshold_that_is_low_enough():
    weights, x, tokens = tiny_ffn()
    what = trace(weights, x, tokens)
    hopeless = LinearGate(jnp.zeros((6, 3)), jnp.full(3, -50.0))
    threshold = recall_threshold(score_histogram(hopeless, weights, what), 0.9)
    assert count(Thresholded(hopeless, jnp.float32(threshold)), weights, [what], 4).recall == 1


def test_where_no_group_fires_none_is_kept():
    assert recall_threshold(histogram_of(random_scores()), 0.9) == np.inf


def test_channels_have_a_density_of_their_own_and_do_not_fire():
    weights, x, tokens = tiny_ffn()
    score = InputMagnitude(weighted=True)
    histogram = score_histogram(score, weights, trace(weights, x, tokens))
    assert histogram.all.sum() == tokens.sum() * 6 and not histogram.firing.any()
    selector = Thresholded(score, jnp.float32(density_threshold(histogram, 0.4)))
    counts = count(selector, weights, [trace(weights, x, tokens)], 4)
    assert 0.4 - 2 / counts.channels < counts.channel_density <= 0.4
    assert counts.density == 1


def test_the_scores_of_an_image_are_calibrated_like_others():
    weights, x, tokens = tiny_ffn(images=40)
    gate = LinearGate(jnp.asarray(np.random.default_rng(0).standard_normal((6, 3)), jnp.float32), jnp.zeros(3))
    score = Pooled(gate, odds=True)
    histogram = score_histogram(score, weights, trace(weights, x, tokens))
    selector = Thresholded(score, jnp.float32(density_threshold(histogram, 0.5)))
    assert 0.45 < count(selector, weights, [trace(weights, x, tokens)], 4).density <= 0.5


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_targets_must_be_shares(share):
    histogram = histogram_of(random_scores())
    with pytest.raises(ValueError, match="a density must be between 0 and 1"):
        density_threshold(histogram, share)
    with pytest.raises(ValueError, match="a recall must be between 0 and 1"):
        recall_threshold(histogram, share)


def test_calibration_needs_images():
    empty = ScoreHistogram(np.zeros(8, np.int64), np.zeros(8, np.int64))
    for threshold_of in (density_threshold, recall_threshold):
        with pytest.raises(ValueError, match="no images"):
            threshold_of(empty, 0.5)
    with pytest.raises(ValueError, match="no images"):
        measure_scores(tiny_detector(), CachedBatches([]), {})


def test_sums_of_histograms_do_not_overflow():
    full = ScoreHistogram(*[np.full(4, 2**31 - 1, np.int32)] * 2)
    total = reduce(add_by_name, [{"f": full}] * 3)["f"]
    for counts in (total.all, total.firing):
        assert counts.dtype == np.int64 and (counts == 3 * (2**31 - 1)).all()


@pytest.fixture(scope="module")
def model():
    return tiny_detector()


@pytest.fixture(scope="module")
def passes(model):
    """Two batches of a detector; the last one is filled with a copy."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, 2, 32, 40, 3)).astype(np.float32)
    mask = np.ones((2, 32, 40), bool)
    mask[1, :, 24:] = False
    embed = jax.jit(model.embed)
    valid = [np.array([True, True]), np.array([True, False])]
    return CachedBatches([embed(*batch) for batch in zip(images, [mask] * 2, valid, strict=True)])


@pytest.fixture(scope="module")
def gates():
    rng = np.random.default_rng(3)
    return {
        name: LinearGate(jnp.float32(rng.standard_normal((16, 8))), jnp.float32(rng.standard_normal(8)))
        for name in TINY_CONFIG.ffn_names
    }


def counts_of(model, passes, selectors) -> dict[str, ActivityCounts]:
    return total_counts(
        {name: count_activity(what, 4) for name, what in model.traces(batch, selectors).items()}
        for batch in passes.batches()
    )


HALF_OF_WHAT_FIRES = partial(recall_threshold, recall=0.5)


def test_calibration_reaches_the_recall_on_dense_inputs(model, passes, gates):
    chosen = calibrate(model, passes, gates, HALF_OF_WHAT_FIRES)
    assert set(chosen) == set(gates)
    for name, selector in chosen.items():
        counts = counts_of(model, passes, {name: selector})[name]
        assert 0.5 <= counts.recall < 0.6
        assert selector.score is gates[name]


def test_scores_are_measured_with_other_selectors_running(model, passes, gates):
    closed = {"encoder.0": Thresholded(gates["encoder.0"], jnp.float32(jnp.inf))}
    dense, sparse = measure_scores(model, passes, gates), measure_scores(model, passes, gates, closed)
    np.testing.assert_array_equal(sparse["encoder.0"].all, dense["encoder.0"].all)
    assert (sparse["decoder.0"].all != dense["decoder.0"].all).any()
    assert sparse["decoder.0"].all.sum() == dense["decoder.0"].all.sum() == 3 * TINY_CONFIG.queries * 8


def test_ffns_that_stand_alone_are_calibrated_like_those_of_a_detector(gates):
    ffns = {name: tiny_ffn(32, 16, seed=seed) for seed, name in enumerate(gates)}
    model = StandaloneFFNs({name: weights for name, (weights, _, _) in ffns.items()})
    inputs = FFNInputs({name: x for name, (_, x, _) in ffns.items()}, {name: t for name, (_, _, t) in ffns.items()})
    passes = CachedBatches([inputs, inputs])
    chosen = calibrate(model, passes, gates, partial(density_threshold, density=0.3))
    for counts in counts_of(model, passes, chosen).values():
        assert 0.25 < counts.density <= 0.3
