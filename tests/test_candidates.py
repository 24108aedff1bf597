"""What a search chooses from: what is tried is what a plan then computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_ffn

from detr_jax.calibration.activations import measure
from detr_jax.calibration.allocation import undominated
from detr_jax.calibration.moments import moments_of
from detr_jax.evaluation.counts import count_activity
from detr_jax.kernels import ffn
from detr_jax.methods import Experts, FitMaterial
from detr_jax.models.ffn import forward, permute, trace
from detr_jax.search.candidates import CANDIDATE_KINDS, Candidate, fixed_sets, narrow_experts
from detr_jax.search.search import SearchSettings

F, SIZE = 24, 2
WEIGHTS, X, TOKENS = tiny_ffn(F, 6, images=40)


@pytest.fixture(scope="module")
def candidates() -> list[Candidate]:
    of = trace(WEIGHTS, X, TOKENS)
    statistics = measure(of, jnp.zeros(TOKENS.shape, int), kinds_count=1)
    inputs = np.asarray(X)[np.asarray(TOKENS)]
    material = FitMaterial(WEIGHTS, statistics, hidden_moments=moments_of(of.hidden, TOKENS), inputs=inputs)
    fitted = []
    experts = narrow_experts(material, (0.5, 0.2), Experts(experts=3, router_steps=50), lambda: fitted.append(1))
    assert len(fitted) == 2
    return fixed_sets(material, (0.6, 0.25)) + experts


def error(candidate: Candidate) -> float:
    missed = forward(WEIGHTS, X, candidate.trial(WEIGHTS, X, TOKENS)) - ffn(X, *WEIGHTS)
    return float((np.asarray(missed)[np.asarray(TOKENS)] ** 2).sum())


def test_a_plan_computes_what_was_tried(candidates):
    kinds = [candidate.kind for candidate in candidates]
    assert kinds == ["dense", *["fixed", "fixed, reconstructed"] * 2, *["experts"] * 2]
    assert set(CANDIDATE_KINDS) == set(kinds)
    dense = np.asarray(ffn(X, *WEIGHTS))
    for candidate in candidates:
        tried = np.asarray(forward(WEIGHTS, X, candidate.trial(WEIGHTS, X, TOKENS)))
        ordered = permute(WEIGHTS, candidate.order)
        if candidate.selector is None:
            np.testing.assert_allclose(tried, dense, atol=1e-5)
            continue
        planned = np.asarray(forward(ordered, X, candidate.selector(ordered, X, TOKENS)))
        assert error(candidate) > 0.01
        np.testing.assert_allclose(planned[np.asarray(TOKENS)], tried[np.asarray(TOKENS)], atol=1e-4)


def test_densities_are_what_is_computed(candidates):
    for candidate, density in zip(candidates, (1, 0.6, 0.6, 0.25, 0.25, 0.5, 0.2), strict=True):
        counts = jax.device_get(count_activity(trace(WEIGHTS, X, TOKENS, candidate.trial), 1))
        assert candidate.density == pytest.approx(counts.density, abs=1e-6)
        # Widths of experts are from a grid, 0, 8, 16 and 24 here.
        assert candidate.density == pytest.approx(density, abs=0.17 if candidate.kind == "experts" else 0.05)


def test_experts_share_a_program(candidates):
    """A search runs dozens of them, and each program takes seconds to compile."""
    shapes = [jax.tree.map(jnp.shape, candidate.trial) for candidate in candidates if candidate.kind == "experts"]
    assert shapes[0] == shapes[1]
    assert len({str(jax.tree.structure(c.trial)) for c in candidates if c.kind != "experts"}) == 1


def test_reconstructed_sets_and_experts_are_better_than_fixed_ones(candidates):
    errors = {candidate.kind: error(candidate) for candidate in candidates[3:]}  # the sparser ones
    assert errors["fixed, reconstructed"] < 0.7 * errors["fixed"]
    assert errors["experts"] < 0.7 * errors["fixed"]


@pytest.mark.parametrize("density", [0, 1, -0.5, 1.5])
def test_densities_must_leave_something(density):
    with pytest.raises(ValueError, match="densities of candidates must be above 0 and below 1"):
        SearchSettings(fixed=(density,)).check()


def test_only_settings_that_nothing_beats_are_kept():
    losses = np.array([0.0, 5.0, 1.0, 2.0, 2.0, 9.0])
    costs = np.array([9.0, 3.0, 5.0, 3.0, 4.0, 1.0])
    assert undominated(losses, costs).tolist() == [0, 2, 3, 5]
    assert undominated(np.array([1.0]), np.array([1.0])).tolist() == [0]
