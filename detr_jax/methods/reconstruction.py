"""Output layers that make up for the neurons that are left out.

With h the hidden activations and K the neurons that are kept, W' and b' minimise the mean of ||h_K W' + b' - y||^2,
where y = h W_out + b_out: least squares, in closed form from the mean and covariance of h. Neurons are eliminated one
by one, always the one whose loss costs least once the others have made up for it: the optimal brain surgeon of Hassibi
and Stork 1992, for whole neurons under the squared error of the FFN's output.
"""

from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from detr_jax.models import FFNWeights, OutputLayer

if TYPE_CHECKING:
    from detr_jax.calibration.moments import Moments

RIDGE = 1e-3
"""Of the mean variance, added to each: neurons that hardly ever fire are not relied on."""


def obs_ranking(weights: FFNWeights, moments: "Moments") -> np.ndarray:
    """(F,) the neurons of an FFN by how long they are kept, the last one that is left first.

    `moments` are those of its hidden activations.
    """
    _check(weights, moments)
    order, _ = eliminate(moments.covariance, np.asarray(weights.w_out, np.float64))
    return order


def eliminate(covariance: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eliminates neurons one by one, always the one whose loss costs least once the others have made up for it.

    Args:
        covariance: (n, n) of their activations.
        rows: (n, d) of the output matrix.

    Returns:
        (n,) the neurons, the last one that is left first, those that never vary at the end; and (n,) the mean squared
        error that the loss of each adds, never rising, because one that is cheap only without a dearer one is worth as
        much as that.
    """
    from scipy.linalg.blas import dger  # slow to import

    varies = np.diag(covariance) > 0
    neurons = np.flatnonzero(varies)
    ridged = _ridged(covariance[np.ix_(neurons, neurons)])
    inverse = np.asfortranarray(np.linalg.inv(ridged))
    # (A^-1)_ii is at least 1 / A_ii; after many updates, rounding may make it smaller.
    least = 0.5 / np.diag(ridged)
    rows = rows[neurons]
    # What is gone has a zero row and column, and is cut off now and then.
    order, paid, left = [], [], neurons
    gone = np.zeros(len(left), bool)
    for _ in range(len(neurons)):
        variances = np.maximum(np.diag(inverse), least)
        costs = np.divide((rows**2).sum(1), variances, out=np.full(len(left), np.inf), where=~gone)
        out = int(costs.argmin())
        order.append(left[out])
        paid.append(costs[out])
        gone[out] = True
        column = inverse[:, out].copy()
        column[out] = variances[out]
        rows -= np.outer(column, rows[out] / column[out])
        inverse = dger(-1 / column[out], column, column, a=inverse, overwrite_a=True)
        if gone.mean() > 0.25:
            left, rows, least = left[~gone], rows[~gone], least[~gone]
            inverse = np.asfortranarray(inverse[np.ix_(~gone, ~gone)])
            gone = np.zeros(len(left), bool)
    added = np.zeros(len(varies))
    added[: len(order)] = np.maximum.accumulate(paid)[::-1] if paid else 0
    return np.concatenate([np.array(order[::-1], int), np.flatnonzero(~varies)]), added


def reconstruct_output(weights: FFNWeights, moments: "Moments", kept: np.ndarray) -> OutputLayer:
    """The output layer of an FFN of which the neurons `kept` (F,) bool are left; `w_out` (F, d) is 0 for the others.

    `moments` are those of its hidden activations.
    """
    _check(weights, moments)
    if kept.shape != (len(weights.w_in),) or kept.dtype != bool:
        raise ValueError(f"{len(weights.w_in)} neurons are kept or not: a bool for each, not {kept.dtype} {kept.shape}")
    own = np.asarray(weights.w_out, np.float64)
    covariance = moments.covariance
    fitted = np.zeros_like(own)
    if kept.any():
        missing = covariance[np.ix_(kept, ~kept)] @ own[~kept]
        fitted[kept] = own[kept] + np.linalg.solve(_ridged(covariance[np.ix_(kept, kept)]), missing)
    bias = np.asarray(weights.b_out, np.float64) + moments.mean @ (own - fitted)
    return OutputLayer(jnp.asarray(fitted, jnp.float32), jnp.asarray(bias, jnp.float32))


def _ridged(covariance: np.ndarray) -> np.ndarray:
    """The covariance with a ridge. Where means are far above deviations, rounding makes some eigenvalues negative; then
    the ridge is twice as high as the lowest is deep."""
    identity, variance = np.eye(len(covariance)), np.trace(covariance) / max(len(covariance), 1)
    ridge = max(RIDGE * variance, np.finfo(np.float32).tiny)
    try:
        np.linalg.cholesky(covariance + ridge / 2 * identity)
    except np.linalg.LinAlgError:
        ridge = max(ridge, -2 * np.linalg.eigvalsh(covariance)[0])
    return covariance + ridge * identity


def _check(weights: FFNWeights, moments: "Moments") -> None:
    if np.shape(moments.sums) != (len(weights.w_in),):
        raise ValueError(f"moments of {np.shape(moments.sums)} activations do not fit {len(weights.w_in)} neurons")
