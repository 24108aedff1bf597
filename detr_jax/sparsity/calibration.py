"""Thresholds of gates from what they say about held-out training images."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.model import FFNTrace
from detr_jax.sparsity.gates import LinearGate
from detr_jax.sparsity.grouping import firing_groups

LOGIT_EDGES = np.linspace(-12, 12, 2401)
"""Edges of the histograms; a threshold is one of them, so it is exact to 0.01 in log-odds."""


def firing_histogram(gate: LinearGate, trace: FFNTrace, valid: jax.Array) -> jax.Array:
    """How the gate's log-odds of the groups that do fire are distributed in one batch; jittable.

    Args:
        gate: of the FFN.
        trace: of the FFN in the dense detector.
        valid: (batch,) bool, false for images that only fill the batch.

    Returns:
        (bins + 1,) int32; entry i counts log-odds in [LOGIT_EDGES[i - 1], LOGIT_EDGES[i]), the first and the last
        those outside.
    """
    logits = gate.logits(trace.inputs)
    fires = firing_groups(trace.hidden, logits.shape[-1]) & (trace.tokens & valid[:, None])[..., None]
    step = LOGIT_EDGES[1] - LOGIT_EDGES[0]
    bins = jnp.clip(jnp.floor((logits - LOGIT_EDGES[0]) / step) + 1, 0, len(LOGIT_EDGES)).astype(jnp.int32)
    return jnp.zeros(len(LOGIT_EDGES) + 1, jnp.int32).at[bins.ravel()].add(fires.ravel().astype(jnp.int32))


def recall_thresholds(batches: Iterable[Mapping[str, jax.Array]], recall: float) -> dict[str, float]:
    """The highest threshold of each FFN at which its gate finds at least `recall` of the groups that fire.

    Args:
        batches: of every batch, the `firing_histogram` of every FFN by name.
        recall: from 0 to 1.

    Returns:
        probabilities by FFN; 0, which computes everything, where no edge of the histogram reaches the recall.

    Raises:
        ValueError: if `recall` is no share, or there are no batches.
    """
    if not 0 <= recall <= 1:
        raise ValueError(f"a recall must be between 0 and 1, not {recall}")
    totals: dict[str, np.ndarray] = {}
    for batch in batches:
        for name, histogram in batch.items():
            totals[name] = totals.get(name, 0) + np.asarray(histogram, np.int64)
    if not totals:
        raise ValueError("there are no images to calibrate thresholds on")
    return {name: _threshold(histogram, recall) for name, histogram in totals.items()}


def _threshold(histogram: np.ndarray, recall: float) -> float:
    found = np.cumsum(histogram[::-1])[::-1][1:]  # firing groups at or above each edge
    enough = np.flatnonzero(found >= recall * histogram.sum())
    return float(1 / (1 + np.exp(-LOGIT_EDGES[enough[-1]]))) if len(enough) else 0.0
