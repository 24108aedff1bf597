"""What every selector keeps, against plain loops; what it costs, and that it passes through `jax.jit`."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY_CONFIG, every_selector, outputs, tiny_detector, tiny_ffn

from detr_jax import kernels
from detr_jax.calibration.activations import ActivationStatistics, measure
from detr_jax.kernels import Execution, repeat_per_tile
from detr_jax.methods import (
    Executed,
    HiddenMagnitude,
    Importance,
    IndicatorSelector,
    InputMagnitude,
    LinearGate,
    LowRankCompensation,
    Oracle,
    PartitionedSelector,
    Pooled,
    Random,
    ShareOfLargest,
    Standardised,
    Thresholded,
    TopK,
    Traits,
    by_activity,
    by_contribution,
    find_indicators,
    log_odds,
    low_rank_factors,
    sketch,
)
from detr_jax.models import FFNWeights, Partition, Selection
from detr_jax.models.ffn import forward, trace

F, D, SIZE = 12, 6, 4
WEIGHTS, X, TOKENS = tiny_ffn(F, D)
HIDDEN = np.maximum(np.asarray(X, np.float64) @ np.asarray(WEIGHTS.w_in).T + WEIGHTS.b_in, 0)
SELECTORS = every_selector(WEIGHTS, SIZE)
WITH_THRESHOLD = [name for name, selector in SELECTORS.items() if isinstance(selector, Thresholded)]
GATE = SELECTORS["linear gate"].score


def at(score, threshold) -> Thresholded:
    return Thresholded(score, jnp.float32(threshold))


def kept(selector, x=X, tokens=TOKENS) -> np.ndarray:
    """The groups, neurons or channels that a selector keeps."""
    selection = selector(WEIGHTS, x, tokens)
    active = selection.per_token(TOKENS.shape, F)
    return np.asarray(selection.channels if active is None else active)


def random_images(seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, 32, 40, 3)).astype(np.float32)


@pytest.mark.parametrize("group_size", [1, SIZE])
def test_the_oracles_output_is_the_dense_one(group_size):
    selection = Oracle(group_size)(WEIGHTS, X, TOKENS)
    np.testing.assert_array_equal(selection.active, (HIDDEN.reshape(*X.shape[:2], -1, group_size) > 0).any(-1))
    assert 0 < selection.active.mean() < 0.9
    np.testing.assert_allclose(forward(WEIGHTS, X, selection), kernels.ffn(X, *WEIGHTS), atol=1e-5)


@pytest.mark.parametrize("group_size", [1, 4])
def test_a_detector_with_oracles_detects_what_the_dense_one_does(group_size):
    model = tiny_detector()
    for ffn in model.ffns.values():
        ffn.b_in[...] -= 0.4  # otherwise almost every group fires
    dense = outputs(model, random_images())
    sparse = outputs(
        model, random_images(), selectors=dict.fromkeys(TINY_CONFIG.ffn_names, Oracle(group_size)), trace=True
    )
    np.testing.assert_allclose(sparse.logits, dense.logits, atol=1e-5)
    np.testing.assert_allclose(sparse.boxes, dense.boxes, atol=1e-5)
    assert all(0 < t.selection.active.mean() < 0.8 for t in sparse.traces.values())


def test_open_gates_change_nothing_and_closed_gates_leave_the_bias():
    model = tiny_detector()
    gate = LinearGate(jnp.zeros((TINY_CONFIG.d_model, 4)), jnp.zeros(4))
    dense = outputs(model, random_images()).logits
    opened, closed = (
        outputs(model, random_images(), selectors={n: at(gate, log_odds(p)) for n in TINY_CONFIG.ffn_names}).logits
        for p in (0, 1)
    )
    np.testing.assert_allclose(opened, dense, atol=1e-5)
    assert np.abs(closed - dense).max() > 1e-3
    for layer in (*model.transformer.encoder, *model.transformer.decoder):
        layer.ffn.w_out[...] = jnp.zeros_like(layer.ffn.w_out[...])
    np.testing.assert_allclose(outputs(model, random_images()).logits, closed, atol=1e-5)


def test_a_gate_keeps_the_groups_that_reach_its_threshold():
    weights = FFNWeights(jnp.ones((4, 1)), jnp.zeros(4), jnp.ones((4, 1)), jnp.zeros(1))
    even = at(LinearGate(jnp.array([[1.0, -1.0]]), jnp.zeros(2)), log_odds(0.5))
    x = jnp.array([[2.0], [-2.0], [0.0], [3.0]])
    tokens = jnp.ones(4, bool)
    np.testing.assert_array_equal(even(weights, x, tokens).active, [[1, 0], [0, 1], [1, 1], [1, 0]])
    np.testing.assert_array_equal(even.at(log_odds(0.9))(weights, x, tokens).active, [[0, 0], [0, 0], [0, 0], [1, 0]])


def test_gates_of_one_and_two_layers_are_linear():
    two = SELECTORS["low-rank gate"].score
    one = LinearGate(two.down @ two.up, two.bias)
    expected = np.asarray(X) @ np.asarray(two.down) @ np.asarray(two.up) + two.bias
    for gate in (one, two):
        np.testing.assert_allclose(gate(WEIGHTS, X, TOKENS), expected, rtol=1e-5, atol=1e-5)


def test_log_odds_undo_the_sigmoid():
    assert log_odds(0.5) == 0 and log_odds(0) == -np.inf and log_odds(1) == np.inf
    for probability in (0.01, 0.3, 0.999):
        assert 1 / (1 + np.exp(-log_odds(probability))) == pytest.approx(probability)


@pytest.mark.parametrize("probability", [1.5, -0.1, float("nan")])
def test_thresholds_of_gates_must_be_probabilities(probability):
    with pytest.raises(ValueError, match=f"a threshold must be a probability, not {probability}"):
        log_odds(probability)


def test_a_threshold_is_a_number():
    assert at(GATE, 0).at(-np.inf).threshold == -np.inf
    with pytest.raises(ValueError, match="cannot be NaN"):
        at(GATE, 0).at(float("nan"))


@pytest.mark.parametrize("name", WITH_THRESHOLD)
def test_the_lowest_threshold_computes_everything_and_the_highest_nothing(name):
    everything = SELECTORS[name].at(-np.inf)
    assert kept(everything).all()
    dense = kernels.ffn(X, *WEIGHTS)
    np.testing.assert_allclose(forward(WEIGHTS, X, everything(WEIGHTS, X, TOKENS)), dense, atol=1e-6)
    assert not kept(everything.at(np.inf)).any()
    assert 0 < kept(SELECTORS[name]).mean() < 1


@pytest.mark.parametrize("name", SELECTORS)
def test_a_selector_is_an_argument_of_what_is_compiled_whatever_its_threshold(name):
    compiled = jax.jit(lambda selector, *arguments: selector(*arguments))
    selector = SELECTORS[name]
    variants = [selector]
    if isinstance(selector, Thresholded):
        variants += [selector.at(0.7), selector.at(-np.inf)]
    if isinstance(selector, LowRankCompensation):
        variants += [dataclasses.replace(selector, of=selector.of.at(0.7))]
    if isinstance(selector, TopK):
        variants += [dataclasses.replace(selector, k=jnp.int32(1))]
    for variant in variants:
        own, other = compiled(variant, WEIGHTS, X, TOKENS), variant(WEIGHTS, X, TOKENS)
        assert jax.tree.structure(own) == jax.tree.structure(other)
        jax.tree.map(np.testing.assert_array_equal, own, other)
    assert compiled._cache_size() == 1


def test_selectors_of_different_kinds_are_different_structures():
    # `jax.jit` looks programs up by structure.
    for one, other in itertools.combinations(SELECTORS.values(), 2):
        assert jax.tree.structure(one) != jax.tree.structure(other)


def test_lots_are_the_same_in_every_call_and_others_elsewhere():
    lots = at(Random(SIZE), -0.5)
    np.testing.assert_array_equal(kept(lots), kept(lots, X + 1))
    assert (kept(lots) != kept(at(Random(SIZE, seed=1), -0.5))).any()
    first, *others = kept(lots).reshape(-1, F // SIZE)
    assert any((first != other).any() for other in others)


@pytest.mark.parametrize("density", [0.01, 0.3, 0.9])
def test_lots_keep_the_density_that_was_asked_for(density):
    weights, x, tokens = tiny_ffn(features=400, images=2, tokens=500)
    kept_lots = at(Random(SIZE), -density)(weights, x, tokens).active
    deviation = np.sqrt(density * (1 - density) / kept_lots.size)
    assert kept_lots.mean() == pytest.approx(density, abs=4 * deviation)


def test_importance_is_the_same_for_every_token():
    importance = Importance(jnp.array([0.5, 3.0, 1.0]))
    np.testing.assert_array_equal(kept(at(importance, 1.0)), np.broadcast_to([False, True, True], (*X.shape[:2], 3)))


@pytest.mark.parametrize("group_size", [1, SIZE])
def test_importance_is_how_often_or_how_much_a_group_contributes_to_a_token(group_size):
    # Two kinds of tokens, one of which is not counted in the second image.
    kinds = np.where(np.arange(3)[:, None] == 1, -1, np.random.default_rng(0).integers(0, 2, TOKENS.shape))
    what = trace(WEIGHTS, X, TOKENS)
    statistics = measure(what, kinds, kinds_count=2)
    fired, contributed, tokens = np.zeros(F // group_size), np.zeros(F // group_size), 0
    for i, t in zip(*np.nonzero(np.asarray(TOKENS) & (kinds >= 0)), strict=True):
        tokens += 1
        for j, h in enumerate(HIDDEN[i, t]):
            fired[j // group_size] += h > 0
            contributed[j // group_size] += h * np.linalg.norm(WEIGHTS.w_out[j])
    np.testing.assert_allclose(by_activity(statistics, group_size).importance, fired / tokens, rtol=1e-5)
    found = by_contribution(statistics, WEIGHTS, group_size).importance
    np.testing.assert_allclose(found, contributed / tokens, rtol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_magnitudes_of_hidden_activations(weighted):
    norms = np.sqrt((np.asarray(WEIGHTS.w_out) ** 2).sum(1)) if weighted else 1
    scores = HiddenMagnitude(weighted)(WEIGHTS, X, TOKENS)
    np.testing.assert_allclose(scores, np.abs(HIDDEN) * norms, rtol=1e-5, atol=1e-5)
    selection = at(HiddenMagnitude(weighted), 0.5)(WEIGHTS, X, TOKENS)
    np.testing.assert_array_equal(selection.active, scores >= 0.5)
    assert selection.channels is None


@pytest.mark.parametrize("weighted", [False, True])
def test_magnitudes_of_input_channels_select_channels(weighted):
    norms = np.sqrt((np.asarray(WEIGHTS.w_in) ** 2).sum(0)) if weighted else 1
    scores = InputMagnitude(weighted)(WEIGHTS, X, TOKENS)
    np.testing.assert_allclose(scores, np.abs(X) * norms, rtol=1e-5)
    selection = at(InputMagnitude(weighted), 0.5)(WEIGHTS, X, TOKENS)
    np.testing.assert_array_equal(selection.channels, scores >= 0.5)
    assert selection.active is None


@pytest.mark.parametrize("of", [HiddenMagnitude(weighted=False), Random(1), InputMagnitude(weighted=False)])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_k_largest_and_no_ties_beyond_them(of, k):
    selection = TopK(of, jnp.int32(k))(WEIGHTS, X, TOKENS)
    which = np.asarray(selection.channels if selection.active is None else selection.active)
    scores = np.asarray(of(WEIGHTS, X, TOKENS))
    kth = np.sort(scores, axis=-1)[..., -k, None]
    tied = (scores >= kth).sum(-1, keepdims=True) > k  # most hidden magnitudes are 0
    np.testing.assert_array_equal(which, np.where(tied, scores > kth, scores >= kth))
    assert which.sum(-1).max() == k


@pytest.mark.parametrize("k", [0, 1, 4, F])
def test_the_k_largest_scores_of_either_sign(k):
    signed = LinearGate(jnp.float32(np.random.default_rng(0).standard_normal((D, F))), jnp.zeros(F))
    expected = np.argsort(np.argsort(-np.asarray(signed(WEIGHTS, X, TOKENS)), axis=-1), axis=-1) < k
    np.testing.assert_array_equal(kept(TopK(signed, jnp.int32(k))), expected)


def test_standardised_scores_are_deviations_from_the_tokens_mean():
    scores = np.asarray(GATE(WEIGHTS, X, TOKENS), np.float64)
    expected = (scores - scores.mean(-1, keepdims=True)) / scores.std(-1, keepdims=True)
    np.testing.assert_allclose(Standardised(GATE)(WEIGHTS, X, TOKENS), expected, atol=1e-3)


def test_shares_of_the_largest_predicted_norm():
    norms = np.log1p(np.exp(np.asarray(GATE(WEIGHTS, X, TOKENS), np.float64)))
    shares = ShareOfLargest(GATE)(WEIGHTS, X, TOKENS)
    np.testing.assert_allclose(shares, norms / norms.max(-1, keepdims=True), rtol=1e-4)
    np.testing.assert_allclose(shares.max(-1), 1)
    nothing = LinearGate(jnp.zeros((D, 3)), jnp.full(3, -1e30))
    np.testing.assert_array_equal(ShareOfLargest(nothing)(WEIGHTS, X, TOKENS), 0)


@pytest.mark.parametrize("odds", [False, True])
@pytest.mark.parametrize("window", [None, 4, 9, 20])
def test_pooled_scores_are_means_over_the_tokens_of_a_window(window, odds):
    images, count, _ = X.shape
    scores = np.asarray(GATE(WEIGHTS, X, TOKENS), np.float64)
    values = 1 / (1 + np.exp(-scores)) if odds else scores
    expected = np.zeros_like(values)
    length = window or count
    for i in range(images):
        for start in range(0, count, length):
            members = [t for t in range(start, min(start + length, count)) if TOKENS[i, t]]
            if members:
                expected[i, start : start + length] = sum(values[i, t] for t in members) / len(members)
    pooled = Pooled(GATE, odds, window)
    assert pooled(WEIGHTS, X, TOKENS).shape == (images, -(-count // length), GROUPS)
    np.testing.assert_allclose(
        repeat_per_tile(pooled(WEIGHTS, X, TOKENS), count, window), expected, rtol=1e-4, atol=1e-6
    )
    disturbed = jnp.where(TOKENS[..., None], X, 1e3)
    np.testing.assert_array_equal(pooled(WEIGHTS, disturbed, TOKENS), pooled(WEIGHTS, X, TOKENS))


def test_a_sketch_of_full_rank_knows_what_neurons_contribute():
    rng = np.random.default_rng(0)
    mean, root = rng.standard_normal(D), rng.standard_normal((D, D))
    contributions = HIDDEN * np.linalg.norm(WEIGHTS.w_out, axis=1)
    for size in (1, SIZE):
        exact = contributions.reshape(*TOKENS.shape, -1, size).sum(-1)
        scores = sketch(WEIGHTS, mean, root @ root.T, D, size)(WEIGHTS, X, TOKENS)
        np.testing.assert_allclose(scores, exact, rtol=1e-3, atol=1e-3)


def test_a_sketch_spends_its_rank_on_what_the_inputs_do():
    # Inputs vary in two directions around a mean, so a sketch of rank 2 is exact for them.
    rng = np.random.default_rng(1)
    mean, axes = rng.standard_normal(D), rng.standard_normal((2, D))
    x = jnp.asarray(mean + rng.standard_normal((1, 30, 2)) @ axes, jnp.float32)
    exact = np.maximum(x @ WEIGHTS.w_in.T + WEIGHTS.b_in, 0) * np.linalg.norm(WEIGHTS.w_out, axis=1)
    scores = sketch(WEIGHTS, mean, axes.T @ axes, 2, 1)(WEIGHTS, x, jnp.ones((1, 30), bool))
    np.testing.assert_allclose(scores, exact, atol=0.05)
    worse = sketch(WEIGHTS, mean, np.eye(D), 2, 1)(WEIGHTS, x, jnp.ones((1, 30), bool))
    assert np.abs(worse - exact).max() > 0.5


def test_sketches_that_cannot_be_made_are_refused():
    with pytest.raises(ValueError, match=f"the rank must be from 1 to {D}, not {D + 1}"):
        sketch(WEIGHTS, np.zeros(D), np.eye(D), D + 1, 1)
    with pytest.raises(ValueError, match=f"an FFN of {D} channels does not fit a covariance of shape \\(4, 4\\)"):
        sketch(WEIGHTS, np.zeros(4), np.eye(4), 1, 1)


@pytest.mark.parametrize("name", ["fixed", "sections", "sections for images"])
def test_sections_compute_always_what_the_gate_wants_or_never(name):
    selector = SELECTORS[name]
    _, gated = Partition(selector.always, selector.gated).parts(WEIGHTS)
    which = kept(selector)
    assert which[..., : selector.always].all() and not which[..., selector.always + selector.gated :].any()
    if selector.gate is not None:
        wanted = selector.gate(gated, X, TOKENS)
        middle = which[..., selector.always : selector.always + selector.gated]
        assert 0 < middle.mean() < 1
        np.testing.assert_array_equal(middle, kernels.expand_groups(wanted.per_token(TOKENS.shape, 0), selector.gated))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", ["fixed", "sections", "sections for images", "pooled", "pooled windows"])
def test_decisions_for_many_tokens_and_sections_are_executed(name, implementation):
    selector = SELECTORS[name]
    masked = forward(WEIGHTS, X, selector(WEIGHTS, X, TOKENS))
    block = {"sections": 3, "sections for images": 1}.get(name, SIZE)
    for execution in (Execution(None, block, implementation=implementation), Execution(4, block, exact=True)):
        if execution.exact or selector.traits.tile_size == execution.tile_size or name == "fixed":
            left_out = jax.jit(lambda x, e=execution: forward(WEIGHTS, x, Executed(selector, e)(WEIGHTS, x, TOKENS)))
            np.testing.assert_allclose(np.asarray(left_out(X))[TOKENS], np.asarray(masked)[TOKENS], atol=1e-4)


def test_sections_must_fit():
    with pytest.raises(ValueError, match="sections of 10 and 4 neurons do not fit an FFN of 12"):
        PartitionedSelector(GATE, 10, 4)(WEIGHTS, X, TOKENS)


def firing_matrix(tokens=300, seed=0) -> np.ndarray:
    """(tokens, F) bool: families that exclude each other, a neuron that never fires and one that rarely does."""
    rng = np.random.default_rng(seed)
    family = rng.integers(0, 3, tokens)
    fires = rng.random((tokens, F)) < np.where(np.arange(F) // 4 == family[:, None], 0.7, 0.04)
    fires[:, 5] = False
    fires[:, 7] = np.arange(tokens) < 3
    return fires


def statistics_of(fires: np.ndarray) -> ActivationStatistics:
    coactive = fires.T.astype(np.int64) @ fires
    blank = {field.name: np.zeros(1) for field in dataclasses.fields(ActivationStatistics)}
    return ActivationStatistics(**blank | {"coactive": coactive})


def slow_indicators(fires: np.ndarray, tau: float, most: int, deviations: float) -> dict[int, set[int]]:
    """The docstring of `selectors.sibs`, neuron by neuron."""
    alive = [j for j in range(F) if fires[:, j].any()]
    silenced = {}
    for i in alive:
        cases = fires[fires[:, i]]
        # Wilson's lower bound of a share is at least tau just if a test of tau against that share rejects it.
        error = deviations * np.sqrt(tau * (1 - tau) / len(cases))
        silenced[i] = {j for j in alive if (~cases[:, j]).mean() - tau >= error}
    chosen: dict[int, set[int]] = {}
    while len(chosen) < most:

        def gain(i):
            total = 0
            for j in silenced[i]:
                known = [(fires[:, i] & fires[:, c]).sum() for c in chosen if j in silenced[c]]
                total += fires[:, i].sum() - max(known, default=0)
            return total

        best = max((i for i in alive if i not in chosen), key=gain)
        if gain(best) == 0:
            break
        chosen[best] = silenced[best]
    return chosen


@pytest.mark.parametrize(("tau", "most", "deviations"), [(0.8, 3, 1.96), (0.9, 5, 1.0), (0.7, 2, 0.0), (0.6, F, 1.96)])
def test_indicators_are_those_of_a_slow_reading(tau, most, deviations):
    fires = firing_matrix()
    expected = slow_indicators(fires, tau, most, deviations)
    found = find_indicators(statistics_of(fires), tau=tau, indicators=most, confidence=deviations)
    assert len(expected) > 1 and found.indicators.tolist() == list(expected)
    assert [set(np.flatnonzero(row)) for row in found.silenced] == list(expected.values())
    np.testing.assert_array_equal(found.alive, fires.any(0))


def test_rare_neurons_indicate_nothing():
    fires = firing_matrix()
    # Neuron 7 fires three times: many neurons are silent then, of which one cannot be sure.
    arguments = {"tau": 0.8, "indicators": F}
    assert 7 not in find_indicators(statistics_of(fires), **arguments).indicators
    assert 7 in find_indicators(statistics_of(fires), **arguments, confidence=0.0).indicators


def test_sibs_computes_indicators_and_skips_what_they_indicate_and_what_never_fired():
    silenced = np.zeros((2, F), bool)
    silenced[0, [2, 5, 9]] = True
    silenced[1, [0, 2, 11]] = True  # neuron 0 is an indicator itself
    alive = np.ones(F, bool)
    alive[[4, 9]] = False
    indicators = [0, 3]
    sibs = IndicatorSelector(jnp.array(indicators), jnp.asarray(silenced), jnp.asarray(alive))
    expected = np.zeros((*TOKENS.shape, F), bool)
    for i, t in np.ndindex(TOKENS.shape):
        fired = [k for k, neuron in enumerate(indicators) if HIDDEN[i, t, neuron] > 0]
        for j in range(F):
            told_silent = any(silenced[k, j] for k in fired)
            expected[i, t, j] = j in indicators or (alive[j] and not told_silent)
    np.testing.assert_array_equal(kept(sibs), expected)
    assert {tuple((HIDDEN[..., indicators] > 0)[i, t]) for i, t in np.ndindex(TOKENS.shape)} >= {(0, 0), (0, 1), (1, 0)}


def test_sibs_without_indicators_skips_what_never_fired():
    always = np.ones((50, F), bool)
    always[:, 5] = False
    sibs = find_indicators(statistics_of(always), tau=0.9, indicators=4)
    assert len(sibs.indicators) == 0
    np.testing.assert_array_equal(kept(sibs), np.broadcast_to(np.arange(F) != 5, (*TOKENS.shape, F)))


@pytest.mark.parametrize("tau", [0, 1.1, float("nan")])
def test_tau_must_be_a_share(tau):
    with pytest.raises(ValueError, match="tau must be above 0 and at most 1"):
        find_indicators(statistics_of(firing_matrix()), tau=tau, indicators=2)


def test_indicators_need_statistics():
    with pytest.raises(ValueError, match=r"decoder\.1: no neuron is active in these statistics"):
        find_indicators(statistics_of(np.zeros((10, F), bool)), tau=0.9, indicators=2, name="decoder.1")


@pytest.mark.parametrize("name", ["input magnitude", "linear gate", "hidden magnitude"])
@pytest.mark.parametrize("threshold", [0.5, np.inf])
def test_factors_of_full_rank_make_up_for_whatever_is_left_out(name, threshold):
    of = SELECTORS[name].at(threshold)
    dense, left = kernels.ffn(X, *WEIGHTS), forward(WEIGHTS, X, of(WEIGHTS, X, TOKENS))
    assert np.abs(left - dense).max() > 0.1
    whole = LowRankCompensation(of, low_rank_factors(WEIGHTS, D))(WEIGHTS, X, TOKENS)
    np.testing.assert_allclose(forward(WEIGHTS, X, whole), dense, rtol=1e-4, atol=1e-4)


def test_compensation_leaves_the_selection_as_it_is():
    for name, of in (("compensated channels", "input magnitude"), ("compensated groups", "linear gate")):
        own, other = SELECTORS[name](WEIGHTS, X, TOKENS), SELECTORS[of](WEIGHTS, X, TOKENS)
        assert (own.active is None, own.channels is None) == (other.active is None, other.channels is None)
        np.testing.assert_array_equal(kept(SELECTORS[name]), kept(SELECTORS[of]))
        assert own.factors is SELECTORS[name].factors


@pytest.mark.parametrize("rank", [1, 3, D])
def test_low_rank_factors_are_the_best_ones(rank):
    factors = low_rank_factors(WEIGHTS, rank)
    assert [f.shape for f in factors] == [(F, rank), (rank, D)] * 2
    products = (factors.in_neurons @ factors.in_model, factors.out_neurons @ factors.out_model)
    for matrix, product in zip((WEIGHTS.w_in, WEIGHTS.w_out), products, strict=True):
        rest = np.linalg.svd(np.asarray(matrix), compute_uv=False)[rank:]
        assert np.linalg.norm(matrix - product) == pytest.approx(np.sqrt((rest**2).sum()), abs=1e-5)


@pytest.mark.parametrize("rank", [0, -1, D + 1])
def test_ranks_beyond_the_matrices_are_refused(rank):
    with pytest.raises(ValueError, match=f"the rank must be from 1 to {D}, not {rank}"):
        low_rank_factors(WEIGHTS, rank)


GROUPS = F // SIZE
EXPECTED_TRAITS_AND_COST = {
    "lots": (Traits("nothing", "group", "both"), 0),
    "importance": (Traits("statistics", "group", "both", dynamic=False), 0),
    "hidden magnitude": (Traits("statistics", "neuron", "second"), 0),
    "weighted hidden magnitude": (Traits("statistics", "neuron", "second"), F),
    "input magnitude": (Traits("statistics", "channel", "first"), 0),
    "weighted input magnitude": (Traits("statistics", "channel", "first"), D),
    "linear gate": (Traits("training", "group", "both"), D * GROUPS),
    "low-rank gate": (Traits("training", "group", "both"), 2 * (D + GROUPS)),
    "top k": (Traits("training", "group", "both"), D * GROUPS),
    "standardised": (Traits("training", "group", "both"), D * GROUPS),
    "share of largest": (Traits("training", "group", "both"), D * GROUPS),
    "pooled": (Traits("training", "image", "both", tile_size=None), D * GROUPS),
    "pooled windows": (Traits("training", "image", "both", tile_size=4), D * GROUPS),
    "fixed set": (Traits("statistics", "group", "both", dynamic=False, tile_size=None), 0),
    "sketch": (Traits("statistics", "group", "both"), 3 * (D + F)),
    "fixed": (Traits("statistics", "neuron", "both", dynamic=False), 0),
    "sections": (Traits("training", "group", "both"), 2 * D),
    "sections for images": (Traits("training", "image", "both", tile_size=None), 4 * D),
    "oracle": (Traits("nothing", "group", "both"), 0),
    "sibs": (Traits("statistics", "neuron", "both"), 2 * F / 32),
    "compensated channels": (Traits("statistics", "channel", "first"), 2 * (D + F)),
    "compensated groups": (Traits("training", "group", "both"), D * GROUPS + 2 * 2 * (D + F)),
}


@pytest.mark.parametrize("name", SELECTORS)
def test_what_a_method_needs_and_costs(name):
    traits, cost = EXPECTED_TRAITS_AND_COST[name]
    assert SELECTORS[name].traits == traits
    assert SELECTORS[name].cost(D, F) == cost


@pytest.mark.parametrize("name", SELECTORS)
def test_a_selection_is_of_what_the_traits_say(name):
    selection = SELECTORS[name](WEIGHTS, X, TOKENS)
    if SELECTORS[name].traits.granularity == "channel":
        assert selection.active is None and selection.channels.shape == X.shape
    else:
        count = F if SELECTORS[name].traits.granularity == "neuron" else GROUPS
        if selection.sections is not None:
            count = F  # sections are of neurons, whatever the gate decides about
        assert selection.channels is None and kept(SELECTORS[name]).shape == (*TOKENS.shape, count)
    if not SELECTORS[name].traits.dynamic:
        jax.tree.map(np.testing.assert_array_equal, selection, SELECTORS[name](WEIGHTS, X + 1, TOKENS))
    assert isinstance(selection, Selection)
