"""Allocation of a shared budget among the FFNs, greedily."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detr_jax.errors import InputError, MissingFileError

Choice = tuple[int, ...]
"""Of each FFN the index of a setting: a column of the tables of losses and costs."""


def within_loss(losses: np.ndarray, bound: float) -> Choice:
    """The last setting of each FFN, the others dense, whose loss stays within a bound.

    Args:
        losses: (FFNs, settings), the loss with one FFN at each setting and the others dense; the first one is dense.
        bound: on the loss.

    Raises:
        ValueError: if the bound is negative or NaN.
    """
    if not bound >= 0:
        raise InputError(f"a bound on a loss must be at least 0, not {bound}")
    return tuple(int(np.flatnonzero(np.append(True, row[1:] <= bound))[-1]) for row in losses)


def undominated(losses: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """The settings of one FFN that no other one equals or beats in both loss and cost, the dearest first.

    Args:
        losses: (settings,).
        costs: (settings,).

    Returns:
        (kept,) indices.
    """
    by_cost = np.lexsort((losses, costs))
    kept, least = [], np.inf
    for index in by_cost:
        if losses[index] < least:
            kept.append(index)
            least = losses[index]
    return np.array(kept[::-1])


def greedy(losses: np.ndarray, costs: np.ndarray, budget: float) -> Choice:
    """Starts dense and takes, again and again, the step that loses least for what it saves, until the budget is met.

    What the last step leaves of the budget goes to the denser settings that gain most for what they cost. The greedy
    allocation of Liu et al. 2025, "TEAL" (algorithm 1), with steps of any length, over losses of single FFNs
    that are taken to add up.

    Args:
        losses: (FFNs, settings), the loss with one FFN at each setting and the others dense.
        costs: (FFNs, settings) in any unit: density, or milliseconds of a measured table; falling along a row.
        budget: on the sum of the costs, in the same unit.

    Raises:
        ValueError: if the tables do not fit each other, costs do not fall, or the budget cannot be met.
    """
    _check(losses, costs, budget)
    choice = [0] * len(losses)
    while not _affords(budget, costs, choice):
        steps = [
            ((losses[i, later] - losses[i, c]) / (costs[i, c] - costs[i, later]), i, later)
            for i, c in enumerate(choice)
            for later in range(c + 1, losses.shape[1])
            if costs[i, later] < costs[i, c]
        ]
        _, ffn, setting = min(steps)
        choice[ffn] = setting
    while returns := [
        ((losses[i, c] - losses[i, denser]) / (costs[i, denser] - costs[i, c]), i, denser)
        for i, c in enumerate(choice)
        for denser in range(c)
        if losses[i, denser] < losses[i, c]
        and costs[i, denser] > costs[i, c]
        and _affords(budget, costs, [*choice[:i], denser, *choice[i + 1 :]])
    ]:
        _, ffn, setting = max(returns)
        choice[ffn] = setting
    return tuple(choice)


def cost_table(path: Path, names: Sequence[str], densities: np.ndarray) -> np.ndarray:
    """Reads what each FFN costs at each density, such as measured milliseconds.

    Args:
        path: JSON, {FFN: {density: cost}}; between two densities of the file costs are interpolated.
        names: of the FFNs.
        densities: (settings,) falling from 1.

    Returns:
        (FFNs, settings) as shares of what all FFNs cost dense.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if an FFN is missing, or its densities do not reach from the sparsest to 1, or costs are no numbers.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        rows = {name: sorted((float(d), float(cost)) for d, cost in row.items()) for name, row in table.items()}
    except FileNotFoundError:
        raise MissingFileError(f"there is no file {path} with costs") from None
    except (json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no table of costs {{FFN: {{density: cost}}}}: {error}") from error
    costs = []
    for name in names:
        if not rows.get(name):
            raise InputError(f"{path} has no costs of {name}; it has {', '.join(rows)}")
        known, cost = np.array(rows[name]).T
        if known[0] > densities[-1] or known[-1] < 1 or not np.isfinite(cost).all():
            raise InputError(f"{path}: the costs of {name} must be finite, for densities from {densities[-1]:g} to 1")
        costs.append(np.interp(densities, known, cost))
    # What is measured may be no faster for being sparser; it is never worth more than the best denser setting.
    falling = np.minimum.accumulate(np.array(costs), axis=1)
    return falling / falling[:, 0].sum()


def _cost(costs: np.ndarray, choice: Sequence[int]) -> float:
    return float(sum(costs[i, c] for i, c in enumerate(choice)))


def _affords(budget: float, costs: np.ndarray, choice: Sequence[int]) -> bool:
    """Within the budget, up to the rounding of the sum."""
    return _cost(costs, choice) <= budget * (1 + 1e-9)


def _check(losses: np.ndarray, costs: np.ndarray, budget: float) -> None:
    if losses.shape != costs.shape or losses.ndim != 2:
        raise ValueError(
            f"losses and costs must be (FFNs, settings) tables alike, not {losses.shape} and {costs.shape}"
        )
    if (np.diff(costs, axis=1) > 0).any():
        raise InputError("costs must fall along each FFN's settings, from dense to the sparsest")
    if not _affords(budget, costs, [-1] * len(costs)):
        raise InputError(f"a budget of {budget:g} cannot be met: the sparsest settings cost {costs[:, -1].sum():g}")
