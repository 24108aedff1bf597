"""Counts of active hidden neurons of every FFN, and of those that its selector keeps."""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.kernels import expand_groups
from detr_jax.methods.grouping import active_groups, group_count
from detr_jax.models import FFNTrace


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ActivityCounts:
    """Counts over the tokens of one FFN. The product of a batch's counts fits int32.

    Attributes:
        neurons: pairs of token and neuron.
        neurons_fired: of them, those with an activation above 0.
        neurons_computed: of all, those that the selector keeps.
        neurons_left: those that fire and are kept.
        groups: pairs of token and group.
        groups_fired: of them, those in which a neuron fires.
        groups_computed: of all, those of which the selector keeps a neuron.
        groups_found: those that fire and are kept.
        channels: pairs of token and channel of the FFN's input.
        channels_computed: of them, those that the selector keeps.
    """

    neurons: Any
    neurons_fired: Any
    neurons_computed: Any
    neurons_left: Any
    groups: Any
    groups_fired: Any
    groups_computed: Any
    groups_found: Any
    channels: Any
    channels_computed: Any

    @property
    def zeros(self) -> float:
        """Share of activations that are exactly zero without any selector."""
        return 1 - self.neurons_fired / self.neurons

    @property
    def density(self) -> float:
        """Share of the hidden neurons that are computed."""
        return self.neurons_computed / self.neurons

    @property
    def channel_density(self) -> float:
        """Share of the input's channels that enter the first product."""
        return self.channels_computed / self.channels

    @property
    def neuron_sparsity(self) -> float:
        """Share of activations that are zero or not computed."""
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


def count_activity(trace: FFNTrace, group_size: int) -> ActivityCounts:
    """Counts of one FFN in one batch, in groups of `group_size` neurons; jittable."""
    tokens = trace.tokens[..., None]
    neurons, channels = trace.hidden.shape[-1], trace.inputs.shape[-1]
    groups = group_count(neurons, group_size)
    fired = (trace.hidden > 0) & tokens
    groups_fired = active_groups(trace.hidden, groups) & tokens
    computed = tokens & neurons_computed(trace)
    groups_computed = computed.reshape(*computed.shape[:-1], groups, computed.shape[-1] // groups).any(-1)
    kept_channels = trace.selection.channels
    return ActivityCounts(
        neurons=tokens.sum() * neurons,
        neurons_fired=fired.sum(),
        neurons_computed=computed.sum(),
        neurons_left=(fired & computed).sum(),
        groups=tokens.sum() * groups,
        groups_fired=groups_fired.sum(),
        groups_computed=groups_computed.sum(),
        groups_found=(groups_fired & groups_computed).sum(),
        channels=tokens.sum() * channels,
        channels_computed=tokens.sum() * channels if kept_channels is None else (kept_channels & tokens).sum(),
    )


def neurons_computed(trace: FFNTrace) -> jax.Array:
    """(batch, tokens, F) bool, the hidden neurons that the selection of a trace keeps, padding or not."""
    features = trace.hidden.shape[-1]
    active = trace.selection.per_token(trace.tokens.shape, features)
    return jnp.ones(trace.hidden.shape, bool) if active is None else expand_groups(active, features)


def kept_share(traces: Mapping[str, FFNTrace]) -> jax.Array:
    """(batch,) share of the hidden neurons that is kept for tokens that are no padding, mean over FFNs; jittable."""

    def share(trace: FFNTrace) -> jax.Array:
        kept = (neurons_computed(trace) & trace.tokens[..., None]).sum((1, 2))
        return kept / jnp.maximum(trace.tokens.sum(1) * trace.hidden.shape[-1], 1)

    return jnp.mean(jnp.stack([share(trace) for trace in traces.values()]), axis=0)


def total_counts(batches: Iterable[Mapping[str, ActivityCounts]]) -> dict[str, ActivityCounts]:
    """The sum of the counts of batches, single or one for each device, in Python's unbounded integers."""
    totals: dict[str, ActivityCounts] = {}
    for batch in batches:
        for name, counts in jax.tree.map(lambda count: int(np.asarray(count, np.int64).sum()), dict(batch)).items():
            totals[name] = jax.tree.map(operator.add, totals[name], counts) if name in totals else counts
    return totals
