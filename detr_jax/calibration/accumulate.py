"""The one way in which statistics are summed over a pass."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

from detr_jax.data.batches import BatchSource
from detr_jax.errors import InputError
from detr_jax.mesh import replicate_like, to_host
from detr_jax.pytrees import Sums

Name = TypeVar("Name", bound=Hashable)
Sum = TypeVar("Sum", bound=Sums)


def accumulate(
    measure: Callable[..., Mapping[Name, Sum]], model: Any, batches: BatchSource, purpose: str, *others: Any
) -> dict[Name, Sum]:
    """Statistics by name, summed over one pass.

    Args:
        measure: of `(model, batch, *others)`, compiled once for all passes; returns statistics by name.
        model: on one device, or replicated over several, which then share every batch.
        batches: data.
        purpose: for the error, "measure moments".
        others: pytrees that go where the model is.

    Raises:
        InputError: if there are no images.
    """
    others = replicate_like(model, others)
    totals: dict[Name, Sum] = {}
    for batch in batches.batches():
        totals = add_by_name(totals, to_host(measure(model, batch, *others)))
    if not totals:
        raise InputError(f"there are no images to {purpose} on")
    return totals


def add_by_name(totals: Mapping[Name, Sum], batch: Mapping[Name, Sum]) -> dict[Name, Sum]:
    """Statistics with those of one more batch; the names are those of the batch."""
    return {name: totals[name] + of_batch if name in totals else of_batch for name, of_batch in batch.items()}
