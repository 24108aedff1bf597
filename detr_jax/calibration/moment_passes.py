"""Passes that measure moments of FFNs, from which selectors and second layers are fitted in closed form."""

import jax
import jax.numpy as jnp

from detr_jax.calibration.moments import CrossMoments, Moments, cross_moments_of, moments_of
from detr_jax.data.batches import BatchSource
from detr_jax.kernels import expand_groups
from detr_jax.mesh import replicate_like, to_host
from detr_jax.models import Selectors
from detr_jax.models.base import HasFFNs
from detr_jax.models.standalone import sum_by_name


def measure_moments(ffns_of: HasFFNs, passes: BatchSource) -> tuple[dict[str, Moments], dict[str, Moments]]:
    """Means and covariances of every FFN's inputs and hidden activations while all run dense.

    Args:
        carrier: of the FFNs.
        passes: data; one pass is made.

    Raises:
        ValueError: if there are no images.
    """
    measured = sum_by_name((to_host(_measure_moments(ffns_of, batch)) for batch in passes.batches()), "measure moments")
    names = dict.fromkeys(name for _, name in measured)
    return tuple({name: measured[what, name] for name in names} for what in ("inputs", "hidden"))


@jax.jit
def _measure_moments(ffns_of, batch):
    traces = ffns_of.traces(batch, {}).items()
    return {
        (what, name): moments_of(getattr(trace, what), trace.tokens)
        for what in ("inputs", "hidden")
        for name, trace in traces
    }


def measure_kept(ffns_of: HasFFNs, passes: BatchSource, selectors: Selectors) -> dict[str, CrossMoments]:
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
    selectors = replicate_like(ffns_of, dict(selectors))
    measured = (to_host(_measure_kept(ffns_of, batch, selectors)) for batch in passes.batches())
    return sum_by_name(measured, "measure kept neurons")


@jax.jit
def _measure_kept(ffns_of, batch, selectors):
    weights, traces = ffns_of.ffn_weights(), ffns_of.traces(batch, {})

    def of_ffn(selector, weights, trace):
        features = trace.hidden.shape[-1]
        kept = selector(weights, trace.inputs, trace.tokens).per_token(trace.tokens.shape, features)
        outputs = jnp.matmul(trace.hidden, weights.w_out, precision="highest")
        return cross_moments_of(jnp.where(expand_groups(kept, features), trace.hidden, 0), outputs, trace.tokens)

    return {name: of_ffn(selector, weights[name], traces[name]) for name, selector in selectors.items()}
