"""What a search chooses from: what is tried is what a plan then computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from standalone import FFNInputs, StandaloneFFNs
from tiny import tiny_detector, tiny_ffn

from detr_jax.calibration.activations import measure
from detr_jax.calibration.allocation import undominated
from detr_jax.calibration.moments import measure_kept, measure_pooled, moments_of
from detr_jax.calibration.thresholds import collect_scores
from detr_jax.data.batches import CachedBatches
from detr_jax.evaluation.counts import count_activity
from detr_jax.kernels import Execution, ffn
from detr_jax.methods import Pooled, sketch
from detr_jax.methods.pooled_statistics import fit_pooled_statistics
from detr_jax.models.ffn import forward, permute, trace
from detr_jax.search.candidates import CANDIDATE_KINDS, DYNAMIC, Material, candidates_of, reconstructed
from detr_jax.search.search import SearchSettings

F, SIZE = 24, 2
WEIGHTS, X, TOKENS = tiny_ffn(F, 6, images=40)


def material(window: int | None, block_size: int) -> Material:
    of = trace(WEIGHTS, X, TOKENS)
    inputs = moments_of(X, TOKENS)
    model = StandaloneFFNs({"f": WEIGHTS})
    passes = CachedBatches([FFNInputs({"f": X[i : i + 8]}, {"f": TOKENS[i : i + 8]}) for i in range(0, 40, 8)])
    scores = {
        "sketched": Pooled(sketch(WEIGHTS, inputs.mean, inputs.covariance, 6, SIZE), odds=False, window=window),
        "pooled": fit_pooled_statistics(measure_pooled(model, passes, window)["f"], SIZE, window),
    }
    decisions = {kind: collect_scores(model, passes, {"f": score})["f"] for kind, score in scores.items()}
    statistics = measure(of, jnp.zeros(TOKENS.shape, int), kinds_count=1)
    hidden = moments_of(of.hidden, TOKENS)
    return Material(WEIGHTS, statistics, hidden, scores, decisions, Execution(window, block_size))


def kept_moments(candidate):
    passes = CachedBatches([FFNInputs({"f": X[i : i + 8]}, {"f": TOKENS[i : i + 8]}) for i in range(0, 40, 8)])
    return measure_kept(StandaloneFFNs({"f": WEIGHTS}), passes, {"f": candidate.trial})["f"]


@pytest.mark.parametrize(("window", "block_size"), [(None, SIZE), (4, 2 * SIZE)])
def test_a_plan_computes_what_was_tried(window, block_size):
    found = candidates_of(material(window, block_size), (0.6, 0.25), (0.5, 0.2))
    fixed = ["fixed", "fixed, reconstructed"] * 2
    assert [c.kind for c in found] == ["dense", *fixed, *["sketched"] * 2, *["pooled"] * 2]
    found += [reconstructed(c, WEIGHTS, kept_moments(c)) for c in found if c.kind in DYNAMIC]
    assert set(CANDIDATE_KINDS) == {c.kind for c in found}
    dense = np.asarray(ffn(X, *WEIGHTS))
    for candidate in found:
        tried = np.asarray(forward(WEIGHTS, X, candidate.trial(WEIGHTS, X, TOKENS)))
        ordered = permute(WEIGHTS, candidate.order)
        assert sorted(candidate.order) == list(range(F))
        if candidate.selector is None:
            np.testing.assert_allclose(tried, dense, atol=1e-5)
            continue
        planned = np.asarray(forward(ordered, X, candidate.selector(ordered, X, TOKENS)))
        assert np.abs(tried - dense).max() > 0.01
        if block_size == SIZE or "fixed" in candidate.kind:
            np.testing.assert_allclose(planned[np.asarray(TOKENS)], tried[np.asarray(TOKENS)], atol=1e-4)
        elif candidate.kind in DYNAMIC:  # whole blocks are computed where one of their groups is wanted
            assert np.linalg.norm(planned - dense) <= np.linalg.norm(tried - dense) + 1e-3
            assert candidate.selector.selector.gated % block_size == 0


def test_densities_are_what_is_computed():
    found = candidates_of(material(None, SIZE), (0.5,), (0.3,))
    for candidate, density in zip(found, (1, 0.5, 0.5, 0.3, 0.3), strict=True):
        counts = jax.device_get(count_activity(trace(WEIGHTS, X, TOKENS, candidate.trial), 1))
        # Images weigh by their tokens there, and as decisions here.
        assert candidate.density == pytest.approx(counts.density, abs=0.02)
        assert candidate.density == pytest.approx(density, abs=0.05)
        assert candidate.always <= candidate.density


def test_refitted_sets_are_better_than_fixed_ones():
    errors = {}
    for candidate in candidates_of(material(None, SIZE), (0.5,), ()):
        rest = forward(WEIGHTS, X, candidate.trial(WEIGHTS, X, TOKENS)) - ffn(X, *WEIGHTS)
        errors[candidate.kind] = float((np.asarray(rest)[np.asarray(TOKENS)] ** 2).sum())
    assert errors["dense"] < 1e-6 and errors["fixed, reconstructed"] < 0.7 * errors["fixed"]


@pytest.mark.parametrize("window", [None, 4])
def test_no_second_layer_suits_what_is_kept_better_than_the_fitted_one(window):
    found = candidates_of(material(window, SIZE), (), (0.3,))
    for candidate in (c for c in found if c.kind in DYNAMIC):
        kept = np.asarray(candidate.trial(WEIGHTS, X, TOKENS).per_token(TOKENS.shape, F))
        hidden = np.asarray(trace(WEIGHTS, X, TOKENS).hidden, np.float64)
        wanted = (hidden @ np.asarray(WEIGHTS.w_out) + WEIGHTS.b_out)[np.asarray(TOKENS)]
        rows = np.append(np.where(kept, hidden, 0), np.ones((*TOKENS.shape, 1)), axis=-1)[np.asarray(TOKENS)]
        least = ((rows @ np.linalg.lstsq(rows, wanted)[0] - wanted) ** 2).sum()
        fitted = reconstructed(candidate, WEIGHTS, kept_moments(candidate))
        errors = [
            ((np.asarray(forward(WEIGHTS, X, c.trial(WEIGHTS, X, TOKENS)))[np.asarray(TOKENS)] - wanted) ** 2).sum()
            for c in (candidate, fitted)
        ]
        assert fitted.kind == f"{candidate.kind}, reconstructed" and fitted.density == candidate.density
        assert least <= errors[1] < 1.05 * least < 0.8 * errors[0]


def test_scores_of_padding_alone_decide_nothing():
    tokens = TOKENS.at[:, 4:].set(False)
    score = Pooled(sketch(WEIGHTS, np.zeros(6), np.eye(6), 2, SIZE), odds=False, window=4)
    found = collect_scores(
        StandaloneFFNs({"f": WEIGHTS}), CachedBatches([FFNInputs({"f": X}, {"f": tokens})]), {"f": score}
    )
    assert found["f"].shape == (len(X), F // SIZE)
    np.testing.assert_allclose(found["f"], score(WEIGHTS, X, tokens)[:, 0], rtol=1e-5)


@pytest.mark.parametrize("density", [0, 1, -0.5, 1.5])
def test_densities_must_leave_something(density):
    with pytest.raises(ValueError, match="densities of candidates must be above 0 and below 1"):
        SearchSettings(fixed=(density,)).check(tiny_detector())


def test_only_settings_that_nothing_beats_are_kept():
    losses = np.array([0.0, 5.0, 1.0, 2.0, 2.0, 9.0])
    costs = np.array([9.0, 3.0, 5.0, 3.0, 4.0, 1.0])
    assert undominated(losses, costs).tolist() == [0, 2, 3, 5]
    assert undominated(np.array([1.0]), np.array([1.0])).tolist() == [0]
