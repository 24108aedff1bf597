"""Groups of consecutive hidden neurons."""

import jax
import jax.numpy as jnp

from detr_jax.errors import InputError
from detr_jax.models import FFNWeights


def group_count(neurons: int, group_size: int) -> int:
    """Number of groups of an FFN; raises an InputError if the size does not divide its hidden neurons."""
    if group_size < 1 or neurons % group_size:
        raise InputError(f"{neurons} hidden neurons cannot be divided into groups of {group_size}")
    return neurons // group_size


def active_groups(hidden: jax.Array, groups: int) -> jax.Array:
    """(..., F) activations after the ReLU -> (..., G) bool, the groups with one above 0.

    The label of a group in Sedghi et al. 2025 (arXiv 2510.09380), by a third party's reading of it.
    """
    return (hidden.reshape(*hidden.shape[:-1], groups, hidden.shape[-1] // groups) > 0).any(-1)


def group_output_norms(weights: FFNWeights, hidden: jax.Array, groups: int) -> jax.Array:
    """(..., F) activations -> (..., G) norms ||h_g W_out,g|| of what each group adds to the output."""
    rows = weights.w_out.astype(jnp.float32).reshape(groups, -1, weights.w_out.shape[-1])
    gram = jnp.einsum("gid,gjd->gij", rows, rows)
    grouped = hidden.astype(jnp.float32).reshape(*hidden.shape[:-1], groups, hidden.shape[-1] // groups)
    return jnp.sqrt(jnp.maximum(jnp.einsum("...gi,gij,...gj->...g", grouped, gram, grouped), 0))
