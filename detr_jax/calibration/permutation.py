"""Orders of the hidden neurons that bring those together which are needed together.

An FFN is the same function whatever the order of its hidden neurons; groups of consecutive neurons are not. An order
is an array (F,) whose entry p is the neuron that comes to position p. An InputError refuses groups of a size that does
not divide the neurons.
"""

import numpy as np

from detr_jax.methods.grouping import group_count

_ITERATIONS = 20
"""Of k-means at most."""


def coactivation_permutation(coactive: np.ndarray, group_size: int) -> np.ndarray:
    """Groups of neurons that fire for the same tokens, the most active groups first.

    Greedy: the most active neuron that is left founds a group; then join, one by one, those whose firing overlaps most
    with the members' (Jaccard index, averaged over the members).

    `coactive` are (F, F) counts of tokens for which both neurons fire; on the diagonal those for which one does.
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


def kmeans_permutation(w_in: np.ndarray, group_size: int) -> np.ndarray:
    """Groups of neurons with similar input weights, by balanced k-means.

    The expert construction of Zhang et al. 2022, "MoEfication" (section 3.1), which needs no data.

    `w_in` is (F, d), neurons on rows, which are compared by direction.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    groups = group_count(len(w_in), group_size)
    rows = w_in / np.maximum(np.linalg.norm(w_in, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    centres = rows[np.random.default_rng(0).permutation(len(rows))[:groups]]
    assigned = np.full(len(rows), -1)
    for _ in range(_ITERATIONS):
        # Every centre has as many places as a group has members; the assignment is the best there is.
        _, places = linear_sum_assignment(np.repeat(-rows @ centres.T, group_size, axis=1))
        if np.array_equal(places // group_size, assigned):
            break
        assigned = places // group_size
        centres = np.stack([rows[assigned == group].mean(0) for group in range(groups)])
    return np.argsort(assigned, kind="stable")
