"""Means and covariances of activations: what closed-form fits need to know about the data."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.calibration.accumulate import accumulate
from detr_jax.data.batches import BatchSource
from detr_jax.kernels import expand_groups
from detr_jax.models import FFNTrace, FFNWeights, HasFFNs, Selector, Selectors
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


@pytree
class CrossMoments(Sums):
    """Sums over observations of inputs and outputs; of one batch in float32, of many in 64 bits."""

    inputs: Moments
    """(n,) moments; their tokens are observations."""
    output_sums: jax.Array
    """(m,) of the outputs."""
    cross: jax.Array
    """(n, m) of the outer products of inputs and outputs."""

    @property
    def output_mean(self) -> np.ndarray:
        """(m,)."""
        return np.asarray(self.output_sums, np.float64) / max(float(self.inputs.tokens), 1)

    @property
    def cross_covariance(self) -> np.ndarray:
        """(n, m) of inputs and outputs."""
        products = np.asarray(self.cross, np.float64) / max(float(self.inputs.tokens), 1)
        return products - np.outer(self.inputs.mean, self.output_mean)


def cross_moments_of(inputs: jax.Array, outputs: jax.Array, counted: jax.Array) -> CrossMoments:
    """The moments of (batch, observations, n) and (batch, observations, m); jittable.

    `counted` (batch, observations) bool is false for observations that do not count.
    """
    x, y = (
        jnp.where(counted[..., None], values, 0).astype(jnp.float32).reshape(-1, values.shape[-1])
        for values in (inputs, outputs)
    )
    return CrossMoments(moments_of(inputs, counted), y.sum(0), jnp.matmul(x.T, y, precision="highest"))


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


def measure_kept(model: HasFFNs, batches: BatchSource, selectors: Selectors) -> dict[str, CrossMoments]:
    """Cross moments of each FFN's hidden activations, 0 where its selector leaves them out, and of h W_out.

    All FFNs run dense. Raises as `accumulate`.
    """
    return accumulate(_measure_kept, model, batches, "measure kept neurons", dict(selectors))


@jax.jit
def _measure_kept(model: HasFFNs, batch: Any, selectors: Selectors) -> dict[str, CrossMoments]:
    weights, traces = model.ffn_weights(), model.traces(batch, {})

    def of_ffn(selector: Selector, weights: FFNWeights, trace: FFNTrace) -> CrossMoments:
        features = trace.hidden.shape[-1]
        kept = selector(weights, trace.inputs, trace.tokens).per_token(trace.tokens.shape, features)
        outputs = jnp.matmul(trace.hidden, weights.w_out, precision="highest")
        hidden = trace.hidden if kept is None else jnp.where(expand_groups(kept, features), trace.hidden, 0)
        return cross_moments_of(hidden, outputs, trace.tokens)

    return {name: of_ffn(selector, weights[name], traces[name]) for name, selector in selectors.items()}
