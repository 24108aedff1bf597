"""The TPU kernel: interpreted, with a check for races, and compiled for TPUs that are not here."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from kernel_cases import change_backend, close, definition, random_case

from detr_jax.kernels import BlockLists, FFNWeights, mask_to_indices
from detr_jax.kernels.backend import FFNShape, in_tiles
from detr_jax.kernels.dispatch import choose
from detr_jax.kernels.mosaic_tpu import TOKENS, block_sparse_ffn, unsupported
from detr_jax.kernels.operation import block_sparse_ffn as operation

INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")


def tiles_of(array, tile):
    """(tokens, n) -> (tiles, tile, n), as the operation hands them over."""
    return np.pad(array, ((0, -len(array) % tile), (0, 0))).reshape(-1, tile, array.shape[-1])


@jax.jit
def interpreted(tiles, weights, needed, active):
    return block_sparse_ffn(tiles, weights, mask_to_indices(needed), active, interpret=INTERPRET)


@pytest.mark.parametrize(
    "shape",
    [
        {"tokens": 40, "tile": 16, "d": 128, "features": 256, "blocks": 32},
        {"tokens": 40, "tile": 8, "d": 128, "features": 256, "blocks": 4},
        {"tokens": 1, "tile": 8, "d": 256, "features": 128, "blocks": 8},
        {"tokens": 33, "tile": 33, "d": 128, "features": 384, "blocks": 3, "share": 0.7},
        {"tokens": 20, "tile": 16, "d": 128, "features": 256, "blocks": 16, "share": 0.0},
        {"tokens": 20, "tile": 16, "d": 128, "features": 256, "blocks": 16, "share": 1.0},
        {"tokens": TOKENS + 30, "tile": TOKENS + 30, "d": 128, "features": 128, "blocks": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("exact", [False, True])
def test_equals_the_definition(shape, dtype, exact):
    tile = shape["tile"]
    x, weights, needed = random_case(20, dtype=dtype, **shape)
    active = jnp.asarray(np.random.default_rng(21).random((len(x), shape["features"] // 8)) < 0.5) if exact else None
    ours = interpreted(tiles_of(x, tile), weights, needed, None if active is None else tiles_of(active, tile))
    assert ours.dtype == dtype
    close(ours.reshape(-1, x.shape[-1])[: len(x)], definition(x, weights, needed, tile, active), dtype)


def test_outputs_are_poisoned_before_the_call():
    """What the comparisons above rely on: what a kernel does not write is NaN."""
    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    outputs = pl.pallas_call(lambda out: None, out_shape=shape, interpret=INTERPRET)()
    assert jnp.isnan(outputs).all()


def test_lists_in_any_order_with_repetitions(monkeypatch):
    """Through the operation, and as the kernel gets them: whole permutations, not sorted."""
    run = in_tiles(partial(block_sparse_ffn, interpret=INTERPRET))
    change_backend(monkeypatch, "mosaic_tpu", unsupported_reason=unsupported, run=run)
    x, weights, _ = random_case(23, tokens=30, tile=16, d=128, features=64, blocks=8)
    lists = BlockLists(indices=jnp.array([[5, 2, 5, 0, 7, 2], [1, -3, 8, 99, 4, 6]]), counts=jnp.array([6, 5]))
    needed = np.zeros((2, 8), bool)
    needed[0, [0, 2, 5, 7]] = needed[1, [1, 4]] = True
    expected = definition(x, weights, jnp.asarray(needed), 16)
    ours = operation(x, weights, lists, 16, blocks=8, implementation="mosaic_tpu")
    close(ours, expected)
    permutations = BlockLists(jnp.array([[7, 0, 5, 2, 1, 3, 4, 6], [4, 1, 0, 2, 3, 5, 6, 7]]), jnp.array([4, 2]))
    tiles = tiles_of(x, 16)
    ours = block_sparse_ffn(tiles, weights, permutations, interpret=INTERPRET).reshape(-1, x.shape[-1])[: len(x)]
    close(ours, expected)


def test_several_grid_steps(monkeypatch):
    monkeypatch.setattr("detr_jax.kernels.mosaic_tpu.SCALARS", 40)  # two tiles, and one in the last step
    x, weights, needed = random_case(22, tokens=56, tile=8, d=128, features=128, blocks=16)
    ours = block_sparse_ffn(tiles_of(x, 8), weights, mask_to_indices(needed), interpret=INTERPRET)
    close(ours.reshape(-1, 128), definition(x, weights, needed, 8))


def test_what_it_cannot_compute_has_a_reason():
    def ffn_shape(dtype="float32", d=256, features=2048, blocks=32):
        return FFNShape(jnp.dtype(dtype), 64, d, features, features // blocks, 1050)

    assert unsupported(ffn_shape()) is None
    assert "float16" in unsupported(ffn_shape("float16"))
    assert "blocks of 8 neurons are not whole registers of 16 rows" in unsupported(ffn_shape("bfloat16", blocks=256))
    assert unsupported(ffn_shape(blocks=256)) is None
    assert "200 features are not a multiple of 128" in unsupported(ffn_shape(d=200))
    assert "MiB of vector memory" in unsupported(ffn_shape(features=8192))
    if jax.default_backend() != "tpu":
        with pytest.raises(ValueError, match="mosaic_tpu cannot compute this: it runs on TPUs, not on"):
            choose(ffn_shape(), "mosaic_tpu")


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(
    ("dtype", "block_size", "exact"), [("float32", 8, True), ("float32", 64, False), ("bfloat16", 64, False)]
)
def test_compiles_for_tpus(topology, dtype, block_size, exact):
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install libtpu")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("one",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tiles, tile, d, features = 17, 64, 256, 2048
    shapes = [
        ((tiles, tile, d), dtype),
        *(((features, d), dtype), ((features,), dtype), ((features, d), dtype), ((d,), dtype)),
        *(((tiles, features // block_size), "int32"), ((tiles,), "int32")),
        *([((tiles, tile, features // 8), "bool")] if exact else []),
    ]
    operands = [jax.ShapeDtypeStruct(shape, kind, sharding=replicated) for shape, kind in shapes]

    def run(x, w_in, b_in, w_out, b_out, indices, counts, *active):
        return block_sparse_ffn(x, FFNWeights(w_in, b_in, w_out, b_out), BlockLists(indices, counts), *active)

    compiled = jax.jit(run).lower(*operands).compile()
    assert "tpu_custom_call" in compiled.as_text()
