"""Allocation of a shared budget among the FFNs, greedily."""

from collections.abc import Sequence

import numpy as np

from detr_jax.errors import InputError

Choice = tuple[int, ...]
"""Of each FFN the index of a setting: a column of the tables of losses and costs."""


def undominated(losses: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """The settings (kept,) of one FFN that no other one equals or beats in both loss and cost, the dearest first.

    `losses` and `costs` are (settings,).
    """
    kept, least = [], np.inf
    for index in np.lexsort((losses, costs)):
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
    if losses.shape != costs.shape or losses.ndim != 2:
        raise ValueError(
            f"losses and costs must be (FFNs, settings) tables alike, not {losses.shape} and {costs.shape}"
        )
    if (np.diff(costs, axis=1) > 0).any():
        raise InputError("costs must fall along each FFN's settings, from dense to the sparsest")

    def affords(choice: Sequence[int]) -> bool:
        """Within the budget, up to the rounding of the sum."""
        return float(sum(costs[i, c] for i, c in enumerate(choice))) <= budget * (1 + 1e-9)

    if not affords([-1] * len(costs)):
        raise InputError(f"a budget of {budget:g} cannot be met: the sparsest settings cost {costs[:, -1].sum():g}")
    choice = [0] * len(losses)
    while not affords(choice):
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
        and affords([*choice[:i], denser, *choice[i + 1 :]])
    ]:
        _, ffn, setting = max(returns)
        choice[ffn] = setting
    return tuple(choice)
