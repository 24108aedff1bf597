"""The one way in which statistics are summed over a pass."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeVar

from detr_jax.data.batches import BatchSource
from detr_jax.errors import InputError
from detr_jax.mesh import replicate_like, to_host

Name = TypeVar("Name", bound=Hashable)
Sum = TypeVar("Sum")
"""Statistics whose `+` adds on the host, in 64 bits."""


def accumulate(
    measure: Callable[..., Mapping[Name, Sum]], model: Any, batches: BatchSource, purpose: str, *others: Any
) -> dict[Name, Sum]:
    """The sum over one pass of what a function measures of each batch.

    Args:
        measure: of (model, batch, *others), compiled once for all passes; returns statistics by name.
        model: on one device, or replicated over several, which then share every batch.
        batches: data.
        purpose: for the error, "measure moments".
        others: pytrees that go where the model is.

    Raises:
        InputError: if there are no images.
    """
    others = replicate_like(model, others)
    return sum_by_name((to_host(measure(model, batch, *others)) for batch in batches.batches()), purpose)


def sum_by_name(measured: Iterable[Mapping[Name, Sum]], purpose: str) -> dict[Name, Sum]:
    """Statistics by name, summed over batches.

    Raises:
        InputError: if there are none.
    """
    totals: dict[Name, Sum] = {}
    for batch in measured:
        for name, statistics in batch.items():
            totals[name] = totals[name] + statistics if name in totals else statistics
    if not totals:
        raise InputError(f"there are no images to {purpose} on")
    return totals
