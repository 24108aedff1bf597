"""Passes that measure moments of FFNs, from which selectors and second layers are fitted in closed form."""

import jax
import jax.numpy as jnp

from detr_jax.calibration.accumulate import accumulate
from detr_jax.calibration.moments import CrossMoments, Moments, cross_moments_of, moments_of
from detr_jax.data.batches import BatchSource
from detr_jax.kernels import expand_groups
from detr_jax.models import Selectors
from detr_jax.models.base import HasFFNs


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


def measure_kept(model: HasFFNs, batches: BatchSource, selectors: Selectors) -> dict[str, CrossMoments]:
    """What the neurons that selectors keep say of an FFN's whole output, the inputs being those of dense FFNs.

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
