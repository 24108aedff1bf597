"""Counts of what fires in every FFN and what its selector makes of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import jax
import numpy as np

from detr_jax.kernels import expand_groups
from detr_jax.model import FFNTrace, Selectors
from detr_jax.sparsity.grouping import firing_groups, group_count


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FiringCounts:
    """Counts over (token, neuron) and (token, group) pairs of one FFN. The product of a batch's counts fits int32.

    Attributes:
        neurons: pairs of token and neuron.
        neurons_fired: of them, those with an activation above 0.
        neurons_left: of those, the ones in a computed group.
        groups: pairs of token and group.
        groups_fired: of them, those in which a neuron fires.
        groups_computed: of all, those that the selector keeps.
        groups_found: those that fire and are kept.
    """

    neurons: jax.Array
    neurons_fired: jax.Array
    neurons_left: jax.Array
    groups: jax.Array
    groups_fired: jax.Array
    groups_computed: jax.Array
    groups_found: jax.Array

    @property
    def zeros(self) -> float:
        """Share of activations that are exactly zero without any selector."""
        return 1 - self.neurons_fired / self.neurons

    @property
    def neuron_sparsity(self) -> float:
        """Share of activations that are zero or in a skipped group."""
        return 1 - self.neurons_left / self.neurons

    @property
    def group_sparsity(self) -> float:
        """Share of the groups that are skipped."""
        return 1 - self.groups_computed / self.groups

    @property
    def recall(self) -> float:
        """Share of the firing groups that are computed."""
        return _share(self.groups_found, self.groups_fired)

    @property
    def precision(self) -> float:
        """Share of the computed groups that fire."""
        return _share(self.groups_found, self.groups_computed)


def _share(part: int, whole: int) -> float:
    """A part of nothing is all of it: no firing group was missed, none computed in vain."""
    return part / whole if whole else 1.0


def count_firing(trace: FFNTrace, valid: jax.Array, selectors: Selectors, name: str, group_size: int) -> FiringCounts:
    """Counts of one FFN in one batch; jittable.

    Args:
        trace: of the FFN, in the forward pass that the selectors act on.
        valid: (batch,) bool, false for images that only fill the batch.
        selectors: selector of each sparse FFN; one without is dense.
        name: of the FFN.
        group_size: neurons per group.
    """
    tokens = (trace.tokens & valid[:, None])[..., None]
    neurons = trace.hidden.shape[-1]
    groups = group_count(neurons, group_size)
    fired = (trace.hidden > 0) & tokens
    groups_fired = firing_groups(trace.hidden, groups) & tokens
    selector = selectors.get(name)
    computed = tokens & (selector(trace.inputs) if selector is not None else np.ones(groups, bool))
    return FiringCounts(
        neurons=tokens.sum() * neurons,
        neurons_fired=fired.sum(),
        neurons_left=(fired & expand_groups(computed, neurons)).sum(),
        groups=tokens.sum() * groups,
        groups_fired=groups_fired.sum(),
        groups_computed=computed.sum(),
        groups_found=(groups_fired & computed).sum(),
    )


def total_counts(batches: Iterable[Mapping[str, FiringCounts]]) -> dict[str, FiringCounts]:
    """The sum of the counts of batches, in Python's unbounded integers."""
    totals: dict[str, dict[str, int]] = {}
    for batch in batches:
        for name, counts in batch.items():
            total = totals.setdefault(name, dict.fromkeys((f.name for f in fields(FiringCounts)), 0))
            for field in total:
                total[field] += int(getattr(counts, field))
    return {name: FiringCounts(**total) for name, total in totals.items()}
