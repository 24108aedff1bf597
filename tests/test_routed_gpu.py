"""Narrow experts on Hopper GPUs: interpreted, with a check for races, lowered, and compiled for a GPU not here."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_target import ahead_of_time, check_registers, lowered
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_cases import change_backend, close, random_experts, random_routed_inputs

from detr_jax.kernels import Experts, routed_ffn, routed_gpu
from detr_jax.kernels import experts as reference
from detr_jax.kernels.backend import ExpertsShape
from detr_jax.kernels.dispatch import choose_routed

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="running it without a GPU needs JAX 0.11 or later"
)
STACKS = ((2, 8), (1, 0), (1, 150))
definition = jax.jit(reference.routed_ffn)


def interpret():
    return plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")


def run(*operands, blocks=2):
    return jax.jit(partial(routed_gpu.run, blocks=blocks, interpret=interpret()))(*operands)


def check(experts, x, assignment, **options):
    ours = run(x, experts, assignment, **options)
    assert ours.dtype == x.dtype
    exact = jax.tree.map(lambda array: array.astype(jnp.float32), (x, experts))
    close(ours, definition(*exact, assignment), x.dtype)
    return ours


@interpreted
@pytest.mark.parametrize(
    ("stacks", "tokens", "d"),
    [
        (STACKS, 300, 64),
        (((1, 9),), 5, 128),
        (((3, 0),), 20, 64),
        (((7, 3), (6, 4)), 3, 64),
        (((2, 70), (1, 20)), 256, 256),
    ],
    ids=["several stacks", "one expert", "affine maps alone", "more experts than tokens", "256 features"],
)
def test_equals_the_definition(stacks, tokens, d):
    experts = random_experts(stacks, d, jnp.bfloat16)
    check(experts, *random_routed_inputs((tokens,), d, len(experts.b_out), jnp.bfloat16))


@interpreted
@pytest.mark.parametrize(
    "ids",
    [[0] * 200, [4] * 200, [3] * 199 + [0], [4, 0] * 100, [0] * 128 + [1] * 129],
    ids=["all in one", "none", "the last", "half", "full items"],
)
def test_tokens_divided_unevenly(ids):
    x, _ = random_routed_inputs((len(ids),), 64, 4, jnp.bfloat16)
    found = check(random_experts(STACKS, 64, jnp.bfloat16), x, jnp.array(ids))
    assert (np.asarray(found)[np.array(ids) == 4] == 0).all()


@interpreted
@pytest.mark.parametrize("blocks", [1, 3, 132])
def test_any_number_of_blocks(blocks):
    """More and fewer than items, of which a block has one or several, of one chunk or several."""
    experts = random_experts(((1, 70), (1, 200), (1, 10)), 64, jnp.bfloat16)
    check(experts, *random_routed_inputs((500,), 64, 3, jnp.bfloat16), blocks=blocks)


@interpreted
def test_tokens_of_others_and_of_no_expert_leave_no_trace():
    experts = random_experts(STACKS, 64, jnp.bfloat16)
    x, assignment = random_routed_inputs((200,), 64, 4, jnp.bfloat16)
    poisoned = (assignment == 1) | (assignment == 4)
    found = np.asarray(run(jnp.where(poisoned[:, None], jnp.nan, x), experts, assignment), np.float32)
    np.testing.assert_array_equal(found[~poisoned], np.asarray(run(x, experts, assignment), np.float32)[~poisoned])
    assert np.isnan(found[assignment == 1]).all()
    assert (found[assignment == 4] == 0).all()


@interpreted
def test_through_the_operation(monkeypatch):
    interpreted_run = partial(routed_gpu.run, blocks=2, interpret=interpret())
    change_backend(
        monkeypatch, "mosaic_gpu", run_routed=interpreted_run, routed_unsupported_reason=routed_gpu.unsupported
    )
    experts = random_experts(STACKS, 64, jnp.bfloat16)
    x, assignment = random_routed_inputs((2, 90), 64, 4, jnp.bfloat16)
    run = jax.jit(jax.vmap(partial(routed_ffn, implementation="mosaic_gpu"), (0, None, 0)))
    for ids in (assignment, assignment[::-1]):
        close(run(x, experts, ids), definition(x, experts, ids), jnp.bfloat16)
    assert run._cache_size() == 1


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 1000])
@pytest.mark.parametrize("widths", [(200,), (8, 70, 0, 130, 64), (64,) * 150])
def test_items_have_room_for_every_assignment(tokens, widths):
    """Each token has a row of its own, in an item of its expert; the widest experts come first."""
    count, rng = len(widths), np.random.default_rng(0)
    chunks = np.array([-(-width // 64) for width in widths] + [0], np.int32)
    items_of = jax.jit(partial(routed_gpu._items, chunks=chunks))
    spread = np.where(np.arange(tokens) < 4 * count, np.arange(tokens) % count, 0)  # as many partly full as can be
    for ids in (spread, np.zeros(tokens, int), np.full(tokens, count), rng.integers(0, count + 1, tokens)):
        items = jax.tree.map(np.asarray, items_of(jnp.asarray(ids, jnp.int32)))
        number = items.ends[-1]
        assert number <= len(items.experts)
        token = np.flatnonzero(chunks[ids])
        item, place = np.divmod(items.rows[token], routed_gpu.TILE)
        assert (item < number).all()
        np.testing.assert_array_equal(items.experts[item], ids[token])
        np.testing.assert_array_equal(items.tokens[item, place], token)
        assert (np.diff(items.chunks[:number]) <= 0).all()
        counts = np.bincount(ids, minlength=count + 1)[:count]
        assert number * routed_gpu.TILE == routed_gpu.rows_computed(counts, tokens)[chunks[:count] > 0].sum()


def test_what_it_cannot_compute_has_a_reason():
    def reason(dtype="bfloat16", tokens=1050, d=256):
        return routed_gpu.unsupported(ExpertsShape(jnp.dtype(dtype), tokens, d, (128,) * 16))

    assert reason() is None
    assert "not in float32" in reason("float32")
    assert "200 features are not a multiple of 64" in reason(d=200)
    assert "512 features do not fit its registers" in reason(d=512)
    assert "not a symbol" in reason(tokens=jax.export.symbolic_shape("tokens")[0])


@pytest.mark.parametrize(
    ("device", "dtype", "name", "reason"),
    [
        ("9.0", "bfloat16", "mosaic_gpu", None),
        ("9.0", "float32", "xla", "not in float32"),
        ("10.0", "bfloat16", "xla", "of compute capability 9.0, not 10.0"),
    ],
)
def test_hopper_prefers_it(device, dtype, name, reason, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=device)])
    chosen = choose_routed(ExpertsShape(jnp.dtype(dtype), 1050, 256, (128,) * 16))
    assert chosen.backend.name == name
    assert (reason is None and not chosen.refused) or reason in dict(chosen.refused)["mosaic_gpu"]


def test_other_devices_are_told_why():
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="mosaic_gpu cannot compute this: it runs on Hopper GPUs, not on"):
            choose_routed(ExpertsShape(jnp.dtype("bfloat16"), 1050, 256, (128,) * 16), "mosaic_gpu")


def operands(tokens, stacks, *, d=256, sharding=None):
    """Shapes of x, experts and assignment, on a device if one is given."""

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    w_in = tuple(array(*stack, d) for stack in stacks)
    b_in = tuple(array(*stack) for stack in stacks)
    experts = Experts(w_in, b_in, w_in, array(sum(n for n, _ in stacks), d))
    return array(tokens, d), experts, array(tokens, dtype=jnp.int32)


@pytest.mark.parametrize("d", [64, 256])
def test_lowers_for_hopper(d):
    assert "mosaic_gpu" in lowered(routed_gpu.run, *operands(1050, ((6, 64), (4, 300), (1, 0)), d=d))


@pytest.mark.parametrize("check_vma", [False, True])
def test_lowers_for_two_gpus(monkeypatch, check_vma):
    change_backend(monkeypatch, "mosaic_gpu", routed_unsupported_reason=routed_gpu.unsupported)
    tokens, all_of = jax.sharding.PartitionSpec("devices"), jax.sharding.PartitionSpec()
    run = partial(routed_ffn, implementation="mosaic_gpu")
    shards = jax.shard_map(run, in_specs=(tokens, all_of, tokens), out_specs=tokens, check_vma=check_vma)
    assert "mosaic_gpu" in lowered(shards, *operands(2 * 1050, ((16, 128),)), mesh=((2,), ("devices",)))


@pytest.mark.sm_90a
@pytest.mark.parametrize("d", [64, 128, 192, 256])
def test_compiles_for_hopper(d, monkeypatch, capfd):
    """Ahead of time for sm_90a, on a machine without a GPU.

    Reported by ptxas 12.9 with JAX 0.12.0.1: 100, 136, 172 and 236 registers a thread; with 0.10.2: 100, 140, 181 and
    230; no spills. Shared memory of a thread block: 51200, 100352, 149504 and 198656 bytes of 232448.
    """
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    shapes = operands(33600, ((6, 64), (4, 300), (1, 0)), d=d, sharding=ahead_of_time())
    jax.jit(routed_gpu.run).lower(*shapes).compile()
    check_registers(capfd.readouterr())
