"""Groups of neurons, and counts of what fires in them and what a selection keeps."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from detr_jax.evaluation.counts import ActivityCounts, count_activity, total_counts
from detr_jax.methods.grouping import active_groups, group_count
from detr_jax.models import FFNTrace, Selection

BATCH, TOKENS, D, GROUPS, SIZE = 2, 7, 4, 3, 6


def example_trace(selection: Selection, seed: int = 0) -> FFNTrace:
    rng = np.random.default_rng(seed)
    hidden = np.maximum(rng.normal(-1, 1, (BATCH, TOKENS, GROUPS * SIZE)), 0).astype(np.float32)
    inputs = rng.standard_normal((BATCH, TOKENS, D)).astype(np.float32)
    tokens = np.arange(TOKENS) < np.array([[TOKENS], [TOKENS - 3]])
    return FFNTrace(jnp.asarray(inputs), jnp.asarray(hidden), jnp.asarray(tokens), selection)


def lots(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random((BATCH, TOKENS, count)) < 0.4


def test_a_group_fires_when_one_of_its_neurons_does():
    hidden = jnp.array([[0.0, 0.0, 1e-30, 0.0, 0.0, 2.0]])
    np.testing.assert_array_equal(active_groups(hidden, 3), [[False, True, True]])
    np.testing.assert_array_equal(active_groups(hidden, 2), [[True, True]])
    np.testing.assert_array_equal(active_groups(hidden * 0, 2), [[False, False]])


@pytest.mark.parametrize("size", [0, -1, 7])
def test_group_sizes_that_do_not_divide_are_refused(size):
    with pytest.raises(ValueError, match=f"32 hidden neurons cannot be divided into groups of {size}"):
        group_count(32, size)


@pytest.mark.parametrize(
    "selection",
    [
        Selection(),
        Selection(active=lots(GROUPS)),
        Selection(active=lots(GROUPS * SIZE)),
        Selection(active=lots(2 * GROUPS), channels=lots(D)),
        Selection(active=lots(1)),
        Selection(channels=lots(D)),
    ],
    ids=["dense", "groups", "neurons", "half groups and channels", "the whole FFN", "channels"],
)
def test_counts_are_those_of_a_loop(selection):
    trace = example_trace(selection)
    counts = total_counts([{"f": count_activity(trace, SIZE)}] * 2)["f"]
    expected = dict.fromkeys(dataclasses.asdict(counts), 0)
    for i, t in zip(*np.nonzero(trace.tokens), strict=True):
        fires = [bool(h > 0) for h in trace.hidden[i, t]]
        kept = [True] * len(fires)
        if selection.active is not None:
            kept = [
                bool(selection.active[i, t, j * selection.active.shape[-1] // len(fires)]) for j in range(len(kept))
            ]
        channels = [True] * D if selection.channels is None else selection.channels[i, t].tolist()
        expected["neurons"] += len(fires)
        expected["neurons_fired"] += sum(fires)
        expected["neurons_computed"] += sum(kept)
        expected["neurons_left"] += sum(f and k for f, k in zip(fires, kept, strict=True))
        expected["channels"] += D
        expected["channels_computed"] += sum(channels)
        for g in range(GROUPS):
            members = slice(g * SIZE, (g + 1) * SIZE)
            expected["groups"] += 1
            expected["groups_fired"] += any(fires[members])
            expected["groups_computed"] += any(kept[members])
            expected["groups_found"] += any(fires[members]) and any(kept[members])
    assert dataclasses.asdict(counts) == {name: 2 * value for name, value in expected.items()}
    assert counts.recall == expected["groups_found"] / expected["groups_fired"]
    assert counts.precision == expected["groups_found"] / expected["groups_computed"]
    assert counts.density == expected["neurons_computed"] / expected["neurons"]
    assert counts.channel_density == expected["channels_computed"] / expected["channels"]
    assert counts.group_sparsity == 1 - expected["groups_computed"] / expected["groups"]
    assert counts.neuron_sparsity == 1 - expected["neurons_left"] / expected["neurons"]


def test_a_dense_ffn_computes_every_group():
    counts = total_counts([{"f": count_activity(example_trace(Selection()), SIZE)}])["f"]
    assert counts.group_sparsity == 0 and counts.recall == counts.density == counts.channel_density == 1
    assert counts.zeros == counts.neuron_sparsity > 0.5


def test_where_nothing_fires_or_is_computed_nothing_was_missed_or_in_vain():
    trace = example_trace(Selection(active=np.zeros((BATCH, TOKENS, GROUPS), bool)))
    counts = count_activity(dataclasses.replace(trace, hidden=jnp.zeros_like(trace.hidden)), SIZE)
    assert counts.recall == counts.precision == 1


def test_totals_do_not_overflow():
    full = ActivityCounts(*[np.int32(2**31 - 1)] * len(dataclasses.fields(ActivityCounts)))
    total = total_counts([{"f": full}] * 3)["f"]
    assert set(dataclasses.asdict(total).values()) == {3 * (2**31 - 1)}
