"""Passes that measure moments of FFNs, from which selectors and second layers are fitted in closed form."""

from functools import partial

import jax
import jax.numpy as jnp

from detr_jax.kernels import expand_groups
from detr_jax.mesh import beside, fetch
from detr_jax.model import Selectors
from detr_jax.sparsity.carrier import FFNCarrier, sum_by_name
from detr_jax.sparsity.moments import CrossMoments, Moments, cross_moments_of, moments_of
from detr_jax.sparsity.need import contributions
from detr_jax.sparsity.selectors.pooled_statistics import pooled_statistics
from detr_jax.sparsity.tiles import existing_tiles, mean_of_tokens
from detr_jax.training.passes import Passes


def measure_moments(carrier: FFNCarrier, passes: Passes) -> tuple[dict[str, Moments], dict[str, Moments]]:
    """Means and covariances of every FFN's inputs and hidden activations while all run dense.

    Args:
        carrier: of the FFNs.
        passes: data; one pass is made.

    Raises:
        ValueError: if there are no images.
    """
    measured = sum_by_name((fetch(_measure_moments(carrier, batch)) for batch in passes.batches()), "measure moments")
    names = dict.fromkeys(name for _, name in measured)
    return tuple({name: measured[what, name] for name in names} for what in ("inputs", "hidden"))


@jax.jit
def _measure_moments(carrier, batch):
    traces = carrier.traces(batch, {}).items()
    return {
        (what, name): moments_of(getattr(trace, what), trace.tokens)
        for what in ("inputs", "hidden")
        for name, trace in traces
    }


def measure_pooled(carrier: FFNCarrier, passes: Passes, window: int | None) -> dict[str, CrossMoments]:
    """What pooled inputs of every FFN say of what its neurons contribute while all run dense.

    Args:
        carrier: of the FFNs.
        passes: data; one pass is made.
        window: consecutive tokens that are pooled; None for all of an image.

    Returns:
        by name of the FFN the moments of `selectors.pooled_statistics` and of the means over the same tokens of
        h_j ||W_out[j]||.

    Raises:
        ValueError: if there are no images.
    """
    measured = (fetch(_measure_pooled(carrier, batch, window=window)) for batch in passes.batches())
    return sum_by_name(measured, "measure pooled inputs")


@partial(jax.jit, static_argnames="window")
def _measure_pooled(carrier, batch, *, window):
    weights = carrier.ffn_weights()

    def of_ffn(weights, trace):
        pooled = pooled_statistics(trace.inputs, trace.tokens, window)
        contributed = mean_of_tokens(contributions(weights, trace), trace.tokens, window)
        return cross_moments_of(pooled, contributed, existing_tiles(trace.tokens, window or trace.tokens.shape[-1]))

    return {name: of_ffn(weights[name], trace) for name, trace in carrier.traces(batch, {}).items()}


def measure_kept(carrier: FFNCarrier, passes: Passes, selectors: Selectors) -> dict[str, CrossMoments]:
    """What the neurons that selectors keep say of an FFN's whole output, the inputs being those of dense FFNs.

    Args:
        carrier: of the FFNs, which run dense.
        passes: data; one pass is made.
        selectors: by name of the FFN.

    Returns:
        by name the moments of the hidden activations, 0 where they are left out, and of h W_out.

    Raises:
        ValueError: if there are no images.
    """
    selectors = beside(carrier, dict(selectors))
    measured = (fetch(_measure_kept(carrier, batch, selectors)) for batch in passes.batches())
    return sum_by_name(measured, "measure kept neurons")


@jax.jit
def _measure_kept(carrier, batch, selectors):
    weights, traces = carrier.ffn_weights(), carrier.traces(batch, {})

    def of_ffn(selector, weights, trace):
        features = trace.hidden.shape[-1]
        kept = selector(weights, trace.inputs, trace.tokens).per_token(trace.tokens.shape, features)
        outputs = jnp.matmul(trace.hidden, weights.w_out, precision="highest")
        return cross_moments_of(jnp.where(expand_groups(kept, features), trace.hidden, 0), outputs, trace.tokens)

    return {name: of_ffn(selector, weights[name], traces[name]) for name, selector in selectors.items()}
