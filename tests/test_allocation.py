"""Sharing a budget of density or latency among FFNs."""

import itertools
import json

import numpy as np
import pytest
from studies.allocation_tables import cost_table, within_loss

from detr_jax.calibration.allocation import greedy

COSTS = np.array([[1.0, 0.5, 0.2, 0.1]] * 3)
LOSSES = np.array([[0, 0.1, 0.4, 0.9], [0, 0.01, 0.02, 0.05], [0, 0.5, 0.55, 3.0]])


def total(table, choice):
    return sum(row[c] for row, c in zip(table, choice, strict=True))


@pytest.mark.parametrize("budget", [3.0, 2.5, 2.0, 1.5, 1.2, 0.9, 0.5, 0.3])
def test_greedy_meets_the_budget_and_is_near_the_best(budget):
    choice = greedy(LOSSES, COSTS, budget)
    assert total(COSTS, choice) <= budget + 1e-9
    allowed = [c for c in itertools.product(range(4), repeat=3) if total(COSTS, c) <= budget + 1e-9]
    best = min(total(LOSSES, c) for c in allowed)
    assert total(LOSSES, choice) <= best + 0.51  # it may overshoot by one step
    assert best <= total(LOSSES, choice)


def test_a_cheap_ffn_becomes_sparse_first():
    assert greedy(LOSSES, COSTS, 2.2) == (0, 2, 0)
    assert greedy(LOSSES, COSTS, 3.0) == (0, 0, 0)


def test_what_the_last_step_leaves_of_the_budget_is_used():
    costs = np.array([[1.0, 0.5, 0.1]] * 2)
    whole_steps = np.array([[0, 0.5, 0.55]] * 2)
    assert greedy(whole_steps, costs, 1.65) == (1, 0)
    assert greedy(whole_steps, costs, 1.45) == (2, 0)
    no_gain = np.array([[0, 0.5, 0.5]] * 2)
    assert greedy(no_gain, costs, 1.65) == (2, 0)


def test_a_step_may_jump_over_a_bad_setting():
    losses = np.array([[0, 5.0, 0.1], [0, 1.0, 2.0]])
    assert greedy(losses, np.array([[1, 0.9, 0.1]] * 2), 1.2) == (2, 0)


@pytest.mark.parametrize(
    ("losses", "costs", "budget", "message"),
    [
        (LOSSES, COSTS, 0.2, "a budget of 0.2 cannot be met: the sparsest settings cost 0.3"),
        (LOSSES, COSTS[:2], 1, "tables alike"),
        (LOSSES, COSTS[:, ::-1], 1, "costs must fall"),
        (LOSSES, COSTS, float("nan"), "cannot be met"),
    ],
)
def test_tables_that_make_no_sense_are_refused(losses, costs, budget, message):
    with pytest.raises(ValueError, match=message):
        greedy(losses, costs, budget)


def test_a_bound_on_the_loss_of_each_ffn():
    assert within_loss(LOSSES, 0.45) == (2, 3, 0)
    assert within_loss(LOSSES, 0) == (0, 0, 0)
    with pytest.raises(ValueError, match="at least 0, not -1"):
        within_loss(LOSSES, -1)


def test_measured_costs_become_shares_of_the_dense_cost(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"a": {"1": 3.0, "0.5": 2.0, "0.1": 2.5}, "b": {"0.1": 0.5, "1": 1.0}}))
    costs = cost_table(path, ["b", "a"], np.array([1, 0.75, 0.5, 0.1]))
    np.testing.assert_allclose(costs[1], np.array([3, 2.5, 2, 2]) / 4)  # sparser than 0.5 is worth nothing
    np.testing.assert_allclose(costs[0][[0, 3]], np.array([1, 0.5]) / 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "is no table of costs"),
        ("[1]", "is no table of costs"),
        ('{"a": {"x": 1}}', "is no table of costs"),
        ('{"b": {"1": 1}}', "has no costs of a; it has b"),
        ('{"a": {"0.5": 1, "1": 2}}', "for densities from 0.1 to 1"),
        ('{"a": {"0.1": NaN, "1": 2}}', "must be finite"),
    ],
)
def test_wrong_tables_of_costs_are_refused(tmp_path, text, message):
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        cost_table(path, ["a"], np.array([1, 0.1]))
    with pytest.raises(FileNotFoundError):
        cost_table(tmp_path / "none.json", ["a"], np.array([1, 0.1]))
