"""Narrow experts on TPUs: interpreted, with a check for races, and compiled for TPUs that are not here."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from kernel_cases import change_backend, close, random_experts, random_routed_inputs

from detr_jax.kernels import experts as reference
from detr_jax.kernels import routed_ffn, routed_tpu
from detr_jax.kernels.backend import ExpertsShape
from detr_jax.kernels.dispatch import choose_routed

INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
STACKS = ((2, 8), (1, 0), (1, 40))
MEBIBYTES = {"v4:2x2x1": 16, "v5e:2x2": 128, "v5p:2x2x1": 64, "v6e:2x2": 128}
"""Vector memory of a core, as in `pltpu.TpuInfo`."""
definition = jax.jit(reference.routed_ffn)


@pytest.fixture
def small(monkeypatch):
    """Tiles and chunks of few rows, so that small cases have several."""
    monkeypatch.setattr(routed_tpu, "TILE", 16)
    monkeypatch.setattr(routed_tpu, "CHUNK", 16)


def check(experts, x, assignment):
    ours = jax.jit(partial(routed_tpu.run, interpret=INTERPRET))(x, experts, assignment)
    assert ours.dtype == x.dtype
    exact = jax.tree.map(lambda array: array.astype(jnp.float32), (x, experts))
    close(ours, definition(*exact, assignment), x.dtype)
    return ours


@pytest.mark.parametrize(
    ("stacks", "tokens", "d"),
    [
        (STACKS, 50, 256),
        (((1, 9),), 5, 128),
        (((3, 0),), 20, 128),
        (((7, 3), (6, 4)), 3, 256),
        (((2, 8), (1, 20)), 40, 384),
    ],
    ids=["several stacks", "one expert", "affine maps alone", "more experts than tokens", "three registers"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_the_definition(small, stacks, tokens, d, dtype):
    experts = random_experts(stacks, d, dtype)
    check(experts, *random_routed_inputs((tokens,), d, len(experts.b_out), dtype))


def test_tiles_and_chunks_of_their_own_size():
    experts = random_experts(((1, 130), (1, 5)), 256, "bfloat16")
    check(experts, *random_routed_inputs((70,), 256, 2, "bfloat16"))


@pytest.mark.parametrize("ids", [[0] * 20, [4] * 20, [3] * 19 + [0], [4, 0] * 10], ids=["one", "none", "last", "half"])
def test_tokens_divided_unevenly(small, ids):
    x, _ = random_routed_inputs((20,), 128, 4)
    found = check(random_experts(STACKS, 128), x, jnp.array(ids))
    assert (np.asarray(found)[np.array(ids) == 4] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_windows(small, monkeypatch, dtype):
    monkeypatch.setattr(routed_tpu, "WINDOW", 32)
    experts = random_experts(((1, 20), (1, 8)), 128, dtype)
    check(experts, *random_routed_inputs((50,), 128, 2, dtype))


def test_tokens_of_others_and_of_no_expert_leave_no_trace(small):
    experts = random_experts(STACKS, 128)
    x, assignment = random_routed_inputs((40,), 128, 4)
    run = jax.jit(partial(routed_tpu.run, interpret=INTERPRET))
    poisoned = (assignment == 1) | (assignment == 4)
    found = np.asarray(run(jnp.where(poisoned[:, None], jnp.nan, x), experts, assignment))
    np.testing.assert_array_equal(found[~poisoned], np.asarray(run(x, experts, assignment))[~poisoned])
    assert np.isnan(found[assignment == 1]).all()
    assert (found[assignment == 4] == 0).all()


def test_through_the_operation(small, monkeypatch):
    interpreted = partial(routed_tpu.run, interpret=INTERPRET)
    change_backend(monkeypatch, "mosaic_tpu", run_routed=interpreted, routed_unsupported_reason=routed_tpu.unsupported)
    experts = random_experts(STACKS, 128)
    x, assignment = random_routed_inputs((2, 12), 128, 4)
    run = jax.jit(jax.vmap(partial(routed_ffn, implementation="mosaic_tpu"), (0, None, 0)))
    for ids in (assignment, assignment[::-1]):
        close(run(x, experts, ids), definition(x, experts, ids))
    assert run._cache_size() == 1


def test_windows_fit_into_vector_memory():
    def window(tokens, widths=(128,) * 16, memory=16 << 20, dtype="bfloat16", d=256):
        return routed_tpu._window(ExpertsShape(jnp.dtype(dtype), tokens, d, widths), memory)

    assert window(1) == routed_tpu.TILE
    assert window(1050) == 1088
    assert window(33600, memory=128 << 20) == 6720  # five, of the same size
    assert window(33600) < window(33600, widths=(128,)) < 8192
    assert window(33600, widths=(128,) * 200) == 0


def test_what_it_cannot_compute_has_a_reason():
    def reason(dtype="bfloat16", tokens=1050, d=256, widths=(128,) * 16):
        return routed_tpu.unsupported(ExpertsShape(jnp.dtype(dtype), tokens, d, widths))

    assert reason() is None
    assert "not in float16" in reason("float16")
    assert "200 features are not a multiple of 128" in reason(d=200)
    assert "not a symbol" in reason(tokens=jax.export.symbolic_shape("tokens")[0])
    assert "experts take 25 of 16 MiB of vector memory" in reason(widths=(128,) * 200)
    if jax.default_backend() != "tpu":
        with pytest.raises(ValueError, match="mosaic_tpu cannot compute this: it runs on TPUs, not on"):
            choose_routed(ExpertsShape(jnp.dtype("bfloat16"), 1050, 256, (8,)), "mosaic_tpu")


def operands_on(topology, devices, tokens, dtype, stacks):
    """Abstract inputs, experts and assignment on TPUs that are not here, with their mesh."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install libtpu")
    from jax.experimental import topologies

    found = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.sharding.Mesh(np.array(found[:devices]), ("devices",))

    def described(array, *axes):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    x, assignment = jax.ShapeDtypeStruct((tokens, 256), dtype), jax.ShapeDtypeStruct((tokens,), jnp.int32)
    experts = jax.tree.map(described, jax.eval_shape(partial(random_experts, stacks, 256, dtype)))
    return mesh, (described(x, "devices"), experts, described(assignment, "devices"))


@pytest.mark.parametrize(
    ("topology", "dtype", "tokens"),
    [*((topology, "bfloat16", 1050) for topology in MEBIBYTES), ("v4:2x2x1", "float32", 9000)],
)
def test_compiles_for_tpus(topology, dtype, tokens):
    _, operands = operands_on(topology, 1, tokens, dtype, ((6, 64), (4, 300), (1, 0)))
    run = partial(routed_tpu.run, memory=MEBIBYTES[topology] << 20)
    compiled = jax.jit(run).lower(*operands).compile()
    assert "tpu_custom_call" in compiled.as_text()


@pytest.mark.parametrize("check_vma", [False, True])
def test_compiles_for_several_devices(monkeypatch, check_vma):
    change_backend(monkeypatch, "mosaic_tpu", routed_unsupported_reason=routed_tpu.unsupported)
    mesh, operands = operands_on("v5e:2x2", 4, 4 * 1050, "bfloat16", ((16, 128),))
    tokens, all_of = jax.sharding.PartitionSpec("devices"), jax.sharding.PartitionSpec()
    run = partial(routed_ffn, implementation="mosaic_tpu")
    shards = jax.shard_map(run, mesh=mesh, in_specs=(tokens, all_of, tokens), out_specs=tokens, check_vma=check_vma)
    compiled = jax.jit(shards).lower(*operands).compile()
    assert "tpu_custom_call" in compiled.as_text()
    assert "all-" not in compiled.as_text()
