"""Groups of consecutive hidden neurons."""

import jax

from detr_jax.errors import InputError


def group_count(neurons: int, group_size: int) -> int:
    """Number of groups of an FFN.

    Raises:
        ValueError: if the hidden neurons cannot be divided into groups of that size.
    """
    if group_size < 1 or neurons % group_size:
        raise InputError(f"{neurons} hidden neurons cannot be divided into groups of {group_size}")
    return neurons // group_size


def active_groups(hidden: jax.Array, groups: int) -> jax.Array:
    """The groups in which a neuron fires: those whose activations have a Euclidean norm above 0.

    The label of a group in Sedghi et al. 2025 (arXiv 2510.09380), by a third party's reading of it.

    Args:
        hidden: (..., F) activations after the ReLU.
        groups: G, a divisor of F.

    Returns:
        (..., G) bool.
    """
    return (hidden.reshape(*hidden.shape[:-1], groups, -1) > 0).any(-1)
