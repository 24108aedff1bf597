"""Means and covariances of activations: what closed-form fits need to know about the data."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.calibration.accumulate import accumulate
from detr_jax.data.batches import BatchSource
from detr_jax.kernels import expand_groups
from detr_jax.methods.pooled_statistics import pooled_statistics
from detr_jax.methods.tiles import existing_tiles, mean_of_tokens
from detr_jax.models import HasFFNs, Selectors
from detr_jax.pytrees import Sums


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moments(Sums):
    """Sums over tokens; of one batch in float32, of many in 64 bits.

    Attributes:
        tokens: () number of tokens.
        sums: (n,) of the activations.
        products: (n, n) of the activations' outer products.
    """

    tokens: jax.Array
    sums: jax.Array
    products: jax.Array

    @property
    def mean(self) -> np.ndarray:
        """(n,)."""
        return np.asarray(self.sums, np.float64) / max(float(self.tokens), 1)

    @property
    def covariance(self) -> np.ndarray:
        """(n, n)."""
        return np.asarray(self.products, np.float64) / max(float(self.tokens), 1) - np.outer(self.mean, self.mean)


def moments_of(activations: jax.Array, tokens: jax.Array) -> Moments:
    """The moments of one batch; jittable.

    Args:
        activations: (batch, tokens, n).
        tokens: (batch, tokens) bool, false for padding.
    """
    kept = jnp.where(tokens[..., None], activations, 0).astype(jnp.float32).reshape(-1, activations.shape[-1])
    return Moments(tokens.sum(), kept.sum(0), jnp.matmul(kept.T, kept, precision="highest"))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossMoments(Sums):
    """Sums over observations of inputs and outputs; of one batch in float32, of many in 64 bits.

    Attributes:
        inputs: (n,) moments; their tokens are observations.
        output_sums: (m,) of the outputs.
        cross: (n, m) of the outer products of inputs and outputs.
    """

    inputs: Moments
    output_sums: jax.Array
    cross: jax.Array

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
    """The moments of one batch; jittable.

    Args:
        inputs: (batch, observations, n).
        outputs: (batch, observations, m).
        counted: (batch, observations) bool, false for observations that do not count.
    """
    x, y = (
        jnp.where(counted[..., None], values, 0).astype(jnp.float32).reshape(-1, values.shape[-1])
        for values in (inputs, outputs)
    )
    return CrossMoments(moments_of(inputs, counted), y.sum(0), jnp.matmul(x.T, y, precision="highest"))


def measure_moments(model: HasFFNs, batches: BatchSource) -> tuple[dict[str, Moments], dict[str, Moments]]:
    """Means and covariances of every FFN's inputs and hidden activations while all run dense.

    Args:
        model: the FFNs.
        batches: data; one pass is made.

    Raises:
        ValueError: if there are no images.
    """
    measured = accumulate(_measure_moments, model, batches, "measure moments")
    names = dict.fromkeys(name for _, name in measured)
    return tuple({name: measured[what, name] for name in names} for what in ("inputs", "hidden"))


@jax.jit
def _measure_moments(model, batch):
    traces = model.traces(batch, {}).items()
    return {
        (what, name): moments_of(getattr(trace, what), trace.tokens)
        for what in ("inputs", "hidden")
        for name, trace in traces
    }


def measure_pooled(model: HasFFNs, batches: BatchSource, window: int | None) -> dict[str, CrossMoments]:
    """Cross moments of every FFN's pooled inputs and the mean contributions of its neurons while all run dense.

    Args:
        model: the FFNs.
        batches: data; one pass is made.
        window: consecutive tokens that are pooled; None for all of an image.

    Returns:
        by name the moments of `pooled_statistics`, (3 d,), and of the means over the same tokens of h_j ||W_out[j]||.

    Raises:
        InputError: if there are no images.
    """
    return accumulate(partial(_measure_pooled, window=window), model, batches, "measure pooled inputs")


@partial(jax.jit, static_argnames="window")
def _measure_pooled(model, batch, *, window):
    weights = model.ffn_weights()

    def of_ffn(weights, trace):
        norms = jnp.linalg.norm(weights.w_out.astype(jnp.float32), axis=1)
        contributed = mean_of_tokens(trace.hidden.astype(jnp.float32) * norms, trace.tokens, window)
        counted = existing_tiles(trace.tokens, window or trace.tokens.shape[-1])
        return cross_moments_of(pooled_statistics(trace.inputs, trace.tokens, window), contributed, counted)

    return {name: of_ffn(weights[name], trace) for name, trace in model.traces(batch, {}).items()}


def measure_kept(model: HasFFNs, batches: BatchSource, selectors: Selectors) -> dict[str, CrossMoments]:
    """Cross moments of each FFN's kept hidden activations and its whole output, for the inputs of dense FFNs.

    Args:
        model: the FFNs, which run dense.
        batches: data; one pass is made.
        selectors: by name of the FFN.

    Returns:
        by name the moments of the hidden activations, 0 where they are left out, and of h W_out.

    Raises:
        ValueError: if there are no images.
    """
    return accumulate(_measure_kept, model, batches, "measure kept neurons", dict(selectors))


@jax.jit
def _measure_kept(model, batch, selectors):
    weights, traces = model.ffn_weights(), model.traces(batch, {})

    def of_ffn(selector, weights, trace):
        features = trace.hidden.shape[-1]
        kept = selector(weights, trace.inputs, trace.tokens).per_token(trace.tokens.shape, features)
        outputs = jnp.matmul(trace.hidden, weights.w_out, precision="highest")
        return cross_moments_of(jnp.where(expand_groups(kept, features), trace.hidden, 0), outputs, trace.tokens)

    return {name: of_ffn(selector, weights[name], traces[name]) for name, selector in selectors.items()}
