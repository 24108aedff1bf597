"""Means and covariances of activations: what closed-form fits need to know about the data."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.calibration.accumulate import accumulate
from detr_jax.data.batches import BatchSource
from detr_jax.models import HasFFNs
from detr_jax.pytrees import Sums, pytree


@pytree
class Moments(Sums):
    """Sums over tokens; of one batch in float32, of many in 64 bits."""

    tokens: jax.Array
    """() number of tokens."""
    sums: jax.Array
    """(n,) of the activations."""
    products: jax.Array
    """(n, n) of the activations' outer products."""

    @property
    def mean(self) -> np.ndarray:
        """(n,)."""
        return np.asarray(self.sums, np.float64) / max(float(self.tokens), 1)

    @property
    def covariance(self) -> np.ndarray:
        """(n, n)."""
        return np.asarray(self.products, np.float64) / max(float(self.tokens), 1) - np.outer(self.mean, self.mean)


def moments_of(activations: jax.Array, tokens: jax.Array) -> Moments:
    """The moments of (batch, tokens, n); `tokens` (batch, tokens) bool is false for padding. Jittable."""
    kept = jnp.where(tokens[..., None], activations, 0).astype(jnp.float32).reshape(-1, activations.shape[-1])
    return Moments(tokens.sum(), kept.sum(0), jnp.matmul(kept.T, kept, precision="highest"))


def measure_moments(model: HasFFNs, batches: BatchSource) -> tuple[dict[str, Moments], dict[str, Moments]]:
    """Moments of every FFN's inputs and hidden activations while all run dense; raises as `accumulate`."""
    measured = accumulate(_measure_moments, model, batches, "measure moments")
    names = dict.fromkeys(name for _, name in measured)
    return {name: measured["inputs", name] for name in names}, {name: measured["hidden", name] for name in names}


@jax.jit
def _measure_moments(model: HasFFNs, batch: Any) -> dict[tuple[str, str], Moments]:
    traces = model.traces(batch, {}).items()
    return {
        (what, name): moments_of(getattr(trace, what), trace.tokens)
        for what in ("inputs", "hidden")
        for name, trace in traces
    }
