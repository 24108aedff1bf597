"""Orders of the hidden neurons that bring those together which are needed together.

An FFN is the same function whatever the order of its hidden neurons; groups of consecutive neurons are not. An order
is an array (F,) whose entry p is the neuron that comes to position p.
"""

from dataclasses import dataclass

import numpy as np

from detr_jax.calibration.top_p import TopPStatistics
from detr_jax.errors import InputError
from detr_jax.methods.grouping import group_count


def coactivation_permutation(coactive: np.ndarray, group_size: int) -> np.ndarray:
    """Groups of neurons that fire for the same tokens, the most active groups first.

    Greedy: the most active neuron that is left founds a group; then join, one by one, those whose firing overlaps most
    with the members' (Jaccard index, averaged over the members).

    Args:
        coactive: (F, F) counts of tokens for which both neurons fire; on the diagonal those for which one does.
        group_size: neurons per group.

    Returns:
        (F,) order.

    Raises:
        ValueError: if the neurons cannot be divided into groups of that size.
    """
    fired = np.diag(coactive)
    either = np.maximum(fired[:, None] + fired[None, :] - coactive, 1)
    overlap = (coactive / either).astype(np.float32)
    free = np.ones(len(fired), bool)
    order = []
    for _ in range(group_count(len(fired), group_size)):
        members = [int(np.where(free, fired, -1).argmax())]
        free[members[0]] = False
        closeness = overlap[members[0]].copy()
        while len(members) < group_size:
            members.append(int(np.where(free, closeness, -1).argmax()))
            free[members[-1]] = False
            closeness += overlap[members[-1]]
        order += members
    return np.array(order)


def kmeans_permutation(w_in: np.ndarray, group_size: int, *, seed: int = 0, iterations: int = 20) -> np.ndarray:
    """Groups of neurons with similar input weights, by balanced k-means.

    The expert construction of Zhang et al. 2022, "MoEfication" (section 3.1), which needs no data.

    Args:
        w_in: (F, d), neurons on rows; rows are compared by direction.
        group_size: neurons per group.
        seed: of the first centres.
        iterations: at most; fewer where nothing moves any more.

    Returns:
        (F,) order.

    Raises:
        ValueError: if the neurons cannot be divided into groups of that size.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    groups = group_count(len(w_in), group_size)
    rows = w_in / np.maximum(np.linalg.norm(w_in, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    centres = rows[np.random.default_rng(seed).permutation(len(rows))[:groups]]
    assigned = np.full(len(rows), -1)
    for _ in range(iterations):
        # Every centre has as many places as a group has members; the assignment is the best there is.
        _, places = linear_sum_assignment(np.repeat(-rows @ centres.T, group_size, axis=1))
        if np.array_equal(places // group_size, assigned):
            break
        assigned = places // group_size
        centres = np.stack([rows[assigned == group].mean(0) for group in range(groups)])
    return np.argsort(assigned, kind="stable")


@dataclass(frozen=True)
class TopPPermutation:
    """An order in three sections, each of whole blocks.

    Attributes:
        order: (F,).
        always: number of neurons in front that nearly every tile needs.
        gated: number of those that follow, which some tiles need.
        never: number of those at the end, which contribute next to nothing.
    """

    order: np.ndarray
    always: int
    gated: int
    never: int


def top_p_permutation(
    statistics: TopPStatistics, block_size: int, *, always: float = 0.95, negligible: float = 1e-3
) -> TopPPermutation:
    """Blocks of neurons that the same tiles need, between blocks for every tile and blocks for none.

    Greedy: of the gated neurons, the one that contributes most founds a block; then join, one by one, those that add
    least to the tiles that need the block (Jaccard index). How many tiles need it is known of pairs alone, so that a
    neuron adds, at most, the tiles that need it without the member with which it shares most. Where neurons tie, the
    one that contributes more comes first.

    Args:
        statistics: of the FFN.
        block_size: neurons per block.
        always: share of the tiles that need a neuron from which on it is not gated.
        negligible: share of all that is contributed which the neurons that are never computed may make up.

    Raises:
        ValueError: if the neurons cannot be divided into blocks of that size, or a share is not from 0 to 1.
    """
    for name, share in (("always", always), ("negligible", negligible)):
        if not 0 <= share <= 1:
            raise InputError(f"{name} must be a share from 0 to 1, not {share}")
    blocks = group_count(len(statistics.contributed), block_size)
    ranked = np.argsort(-statistics.contributed, kind="stable")
    upwards = np.cumsum(statistics.contributed[ranked[::-1]])
    never = (upwards <= negligible * upwards[-1]).sum() // block_size * block_size
    kept, dropped = np.split(ranked, [blocks * block_size - never])

    frequent = kept[np.diag(statistics.coneeded)[kept] >= always * statistics.tiles]
    constant = frequent[: len(frequent) // block_size * block_size]
    gated = kept[~np.isin(kept, constant)]
    clustered = gated[_greedy_unions(statistics.coneeded[np.ix_(gated, gated)], block_size)]
    order = np.concatenate([constant, clustered, dropped])
    return TopPPermutation(order, len(constant), len(gated), len(dropped))


def _greedy_unions(coneeded: np.ndarray, block_size: int) -> np.ndarray:
    """An order of neurons that are given with the most important one first."""
    needing = np.diag(coneeded)
    free = np.ones(len(needing), bool)
    order: list[int] = []
    while free.any():
        founder = int(free.argmax())
        union, shared = needing[founder], coneeded[founder]
        order.append(founder)
        free[founder] = False
        for _ in range(block_size - 1):
            closeness = shared / np.maximum(union + needing - shared, 1)
            joins = int(np.where(free, closeness, -1).argmax())
            union = union + needing[joins] - shared[joins]
            shared = np.maximum(shared, coneeded[joins])
            order.append(joins)
            free[joins] = False
    return np.array(order, int)
