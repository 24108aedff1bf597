"""Every implementation of the sparse FFN against the definition."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from commands import cpu_devices
from kernel_cases import close, definition, random_case

from detr_jax import kernels
from detr_jax.kernels import BlockLists, Execution, mosaic_gpu, xla
from detr_jax.kernels.backend import FFNShape
from detr_jax.kernels.dispatch import break_even, choose, tuning_path
from detr_jax.kernels.xla import capacities

HERE = ("reference", "xla")
"""Implementations that run on any device."""


SHAPES = [
    {},
    {"tokens": 1, "tile": 8},
    {"tokens": 16},
    {"tokens": 5, "tile": 128},
    {"batch": (2,), "tokens": 50, "tile": 7, "d": 10, "features": 30, "blocks": 5},
    {"batch": (2, 3), "tokens": 9, "tile": 4},
    {"share": 0.0},
    {"share": 1.0},
    {"blocks": 1},
    {"features": 256, "blocks": 32, "share": 0.1},
    {"features": 256, "blocks": 2},
    {"tokens": 75, "tile": 8, "features": 128, "blocks": 2},
    {"tokens": 203, "tile": 2, "features": 64, "blocks": 4, "share": 0.1},
    {"batch": (2,), "tokens": 33, "tile": 4, "features": 96, "blocks": 3, "share": 1.0},
    {"tokens": 33, "tile": 4, "features": 96, "blocks": 3, "share": 0.0},
]


# The reference is the definition: one shape tells that the call reaches it.
@pytest.mark.parametrize(
    ("implementation", "shape"), [("reference", SHAPES[4]), *(("xla", shape) for shape in SHAPES)], ids=str
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_the_definition(implementation, dtype, shape):
    x, weights, needed = random_case(1, dtype=dtype, **shape)
    tile = shape.get("tile", 16)
    ours = jax.jit(partial(kernels.block_sparse_ffn, tile_size=tile, implementation=implementation))(x, weights, needed)
    assert ours.dtype == dtype
    close(ours, definition(x, weights, needed, tile), dtype)


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("tile", [16, 2], ids="tiles of {}".format)
def test_exact_mode_masks_per_token(implementation, tile):
    x, weights, needed = random_case(2, tile=tile)
    active = jnp.asarray(np.random.default_rng(3).random((37, 48)) < 0.5)
    run = partial(kernels.block_sparse_ffn, tile_size=tile, implementation=implementation)
    ours = run(x, weights, needed, active=active)
    close(ours, definition(x, weights, needed, tile, active))
    assert np.abs(ours - run(x, weights, needed)).max() > 0.01


@pytest.mark.parametrize("implementation", HERE)
def test_what_is_not_needed_is_not_computed(implementation):
    """Not multiplied by zero: a block of NaN that nobody needs does no harm."""
    x, weights, needed = random_case(4)
    needed = needed.at[:, 3].set(False)
    poisoned = weights._replace(w_in=weights.w_in.at[24:32].set(jnp.nan))
    ours = kernels.block_sparse_ffn(x, poisoned, needed, 16, implementation=implementation)
    close(ours, definition(x, weights, needed, 16))


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize(("tile", "share"), [(16, 0.0), (16, 0.4), (2, 0.4), (16, 1.0)])
def test_all_of_the_outputs_is_written(implementation, tile, share):
    """The buffer that becomes the output holds NaN before the call: it is donated by an argument nobody reads."""
    x, weights, needed = random_case(5, tile=tile, share=share)
    expected = definition(x, weights, needed, tile)

    @partial(jax.jit, donate_argnums=0, keep_unused=True)
    def run(poisoned, x, weights, needed):
        return kernels.block_sparse_ffn(x, weights, needed, tile, implementation=implementation)

    poisoned = jnp.full_like(x, jnp.nan)
    buffer = poisoned.unsafe_buffer_pointer()
    ours = run(poisoned, x, weights, needed)
    assert ours.unsafe_buffer_pointer() == buffer
    close(ours, expected)


def test_every_number_of_blocks():
    """Each is computed by the capacity that holds it."""
    run = jax.jit(partial(kernels.block_sparse_ffn, tile_size=16, implementation="xla"))
    for count in range(13):
        x, weights, needed = random_case(count, tokens=40)
        chosen = np.random.default_rng(count).permutation(12)[:count]
        needed = needed.at[1].set(False).at[1, chosen].set(True)
        close(run(x, weights, needed), definition(x, weights, needed, 16))


@pytest.mark.parametrize("implementation", HERE)
def test_lists_in_any_order_with_repetitions(implementation):
    x, weights, _ = random_case(6)
    lists = BlockLists(
        indices=jnp.array([[5, 2, 5, 0, 11, 2], [7, 7, 7, 7, 7, 7], [1, -3, 12, 99, 4, 6]]), counts=jnp.array([6, 2, 5])
    )
    needed = np.zeros((3, 12), bool)
    needed[0, [0, 2, 5, 11]] = needed[1, 7] = needed[2, [1, 4]] = True  # what names no block is ignored
    ours = kernels.block_sparse_ffn(x, weights, lists, 16, blocks=12, implementation=implementation)
    close(ours, definition(x, weights, jnp.asarray(needed), 16))


def test_a_map_as_lists_and_back():
    needed = jnp.asarray(np.random.default_rng(7).random((4, 5, 9)) < 0.5)
    lists = kernels.mask_to_indices(needed)
    assert (kernels.indices_to_mask(lists, 9) == needed).all()
    for row, indices, count in zip(
        needed.reshape(-1, 9), lists.indices.reshape(-1, 9), lists.counts.ravel(), strict=True
    ):
        assert indices[:count].tolist() == np.flatnonzero(row).tolist()
        assert sorted(indices.tolist()) == list(range(9))


def test_what_a_tile_needs_is_the_union_of_its_tokens():
    active = np.random.default_rng(8).random((2, 11, 24)) < 0.1
    needed = np.asarray(kernels.any_per_tile(jnp.asarray(active), 4, 6))
    assert needed.shape == (2, 3, 6)
    for image in range(2):
        for tile in range(3):
            for block in range(6):
                part = active[image, 4 * tile : 4 * tile + 4, 4 * block : 4 * block + 4]
                assert needed[image, tile, block] == part.any()
    with pytest.raises(ValueError, match="24 groups of neurons cannot be united into 5 blocks"):
        kernels.any_per_tile(jnp.asarray(active), 4, 5)


@pytest.mark.parametrize("implementation", [*HERE, None])
def test_gradients_are_those_of_the_definition(implementation):
    x, weights, needed = random_case(9)

    def loss(run, x, weights):
        return (run(x, weights, needed, 16) ** 2).sum()

    ours = jax.grad(partial(loss, partial(kernels.block_sparse_ffn, implementation=implementation)), (0, 1))(x, weights)
    theirs = jax.grad(partial(loss, definition), (0, 1))(x, weights)
    jax.tree.map(close, ours, theirs)


@pytest.mark.parametrize("implementation", HERE)
def test_vmap_is_a_batch(implementation):
    x, weights, needed = random_case(10, batch=(3,))
    run = partial(kernels.block_sparse_ffn, tile_size=16, implementation=implementation)
    expected = definition(x, weights, needed, 16)
    close(jax.vmap(run, (0, None, 0))(x, weights, needed), expected)

    def mapped(run, axes):
        return jax.jit(jax.vmap(run, axes))

    close(mapped(run, (0, None, 0))(x, weights, needed), expected)
    close(mapped(run, (None, None, 0))(x[0], weights, needed)[1], definition(x[0], weights, needed[1], 16))
    several = jax.tree.map(lambda array: jnp.stack([array, 2 * array]), weights)
    close(mapped(run, (None, 0, None))(x[0], several, needed[0])[1], definition(x[0], _twice(weights), needed[0], 16))
    nested = mapped(jax.vmap(run, (0, None, None)), (None, None, 0))(x, weights, needed)
    close(nested[2, 1], definition(x[1], weights, needed[2], 16))
    gradient = mapped(jax.grad(lambda x, needed: run(x, weights, needed).sum()), 0)(x, needed)
    close(gradient, jax.grad(lambda x: definition(x, weights, needed, 16).sum())(x))


def _twice(weights):
    return jax.tree.map(lambda array: 2 * array, weights)


def test_a_batch_does_not_become_all_branches_of_a_switch():
    x, weights, needed = random_case(11, batch=(3,), features=512, blocks=32)
    run = jax.jit(jax.vmap(partial(kernels.block_sparse_ffn, tile_size=16, implementation="xla"), (0, None, 0)))
    text = run.lower(x, weights, needed).as_text()
    assert "stablehlo.case" in text or "stablehlo.if" in text


@pytest.mark.parametrize("implementation", [*HERE, None])
def test_an_empty_batch_gives_an_empty_result(implementation):
    x, weights, needed = random_case(18, batch=(0,))
    run = partial(kernels.block_sparse_ffn, tile_size=16, implementation=implementation)
    assert run(x, weights, needed).shape == (0, 37, 24)
    active = jnp.zeros((0, 37, 12), bool)
    assert kernels.sparse_ffn(x, weights, active, Execution(implementation=implementation)).shape == (0, 37, 24)


@pytest.mark.parametrize("implementation", [*HERE, None])
@pytest.mark.parametrize("tile", [37, 16, 2], ids="tiles of {}".format)
def test_forward_mode_is_that_of_the_definition(implementation, tile):
    x, weights, needed = random_case(19, tile=tile)
    tangents = random_case(20, tile=tile)[:2]

    def along(run):
        return jax.jvp(lambda x, weights: run(x, weights, needed, tile), (x, weights), tangents)

    ours = along(jax.jit(partial(kernels.block_sparse_ffn, implementation=implementation), static_argnums=3))
    jax.tree.map(close, ours, along(definition))


@pytest.mark.parametrize("implementation", [*HERE, None])
@pytest.mark.parametrize("tile", [37, 16, 2], ids="tiles of {}".format)
def test_the_number_of_images_may_be_a_symbol(implementation, tile):
    x, weights, needed = random_case(21, batch=(3,), tile=tile)
    (images,) = jax.export.symbolic_shape("images")
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), (x, weights, needed))
    shapes = (
        shapes[0].update(shape=(images, *x.shape[1:])),
        shapes[1],
        shapes[2].update(shape=(images, *needed.shape[1:])),
    )
    run = jax.jit(partial(kernels.block_sparse_ffn, tile_size=tile, implementation=implementation))
    exported = jax.export.export(run)(*shapes)
    for some in (slice(3), slice(1)):
        close(exported.call(x[some], weights, needed[some]), definition(x[some], weights, needed[some], tile))


MESH = """
import sys
sys.path.insert(0, "tests")
from functools import partial
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from kernel_cases import close, definition, random_case
from tiny import TINY_CONFIG, tiny_detector
from detr_jax import kernels
from detr_jax.methods import Executed, Oracle

jax.config.update("jax_default_matmul_precision", "highest")
batch, everywhere = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
specs = (batch, everywhere, batch)
auto = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
explicit = jax.make_mesh((8,), ("data",))
for tile, implementation in ((16, "xla"), (2, "xla"), (16, None)):
    case = random_case(12, batch=(8,), tile=tile)
    expected = definition(*case, tile)
    run = partial(kernels.block_sparse_ffn, tile_size=tile, implementation=implementation)
    for check in (False, True):
        sharded = jax.shard_map(run, mesh=auto, in_specs=specs, out_specs=batch, check_vma=check)
        close(jax.jit(sharded)(*case), expected)
    with jax.set_mesh(explicit):
        placed = jax.device_put(case, tuple(NamedSharding(explicit, spec) for spec in specs))
        outputs = jax.jit(run)(*placed)
        assert jax.typeof(outputs).sharding.spec[0] == "data"
        close(outputs, expected)
        gradient = jax.jit(jax.grad(lambda x, *others: run(x, *others).sum()))(*placed)
        close(gradient, jax.grad(lambda x, *others: definition(x, *others, tile).sum())(*case))

x, weights, _ = case
active = jnp.asarray(np.random.default_rng(0).random((8, 37, 24)) < 0.2)
for execution in (kernels.Execution(), kernels.Execution(8, 8, exact=True, ordered=True)):
    run = partial(kernels.sparse_ffn, execution=execution)
    expected = run(x, weights, active)
    with jax.set_mesh(explicit):
        placed = jax.device_put((x, weights, active), tuple(NamedSharding(explicit, spec) for spec in specs))
        close(jax.jit(run)(*placed), expected)

model = tiny_detector()
images = jnp.asarray(np.random.default_rng(0).random((8, 32, 40, 3)), jnp.float32)
selectors = dict.fromkeys(TINY_CONFIG.ffn_names, Executed(Oracle(4), kernels.Execution()))
run = jax.jit(lambda model, images: model(images, selectors=selectors).logits)
expected = run(model, images)
sharded = jax.shard_map(run, mesh=auto, in_specs=(everywhere, batch), out_specs=batch)
close(jax.jit(sharded)(model, images), expected)
"""


@pytest.mark.slow
def test_runs_over_a_mesh_of_devices():
    environment = os.environ | cpu_devices(8)
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", MESH], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_nothing_recompiles_with_the_data():
    run = jax.jit(partial(kernels.block_sparse_ffn, tile_size=16))
    for seed in range(6):
        x, weights, needed = random_case(seed, share=seed / 5)
        close(run(x, weights, needed), definition(x, weights, needed, 16))
    assert run._cache_size() == 1


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_the_chosen_implementation_falls_back_to_dense_on_the_device(share):
    """On either side of the break-even density the values are the same."""
    x, weights, needed = random_case(13, share=share, batch=(2,))
    active = jnp.asarray(np.random.default_rng(3).random((2, 37, 24)) < 0.5)
    for exact in (None, active):
        ours = jax.jit(partial(kernels.block_sparse_ffn, tile_size=16))(x, weights, needed, active=exact)
        close(ours, definition(x, weights, needed, 16, exact))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("tile", [None, 8])
def test_from_the_groups_that_tokens_need(ordered, exact, tile):
    x, weights, _ = random_case(14, batch=(2,), tokens=30)
    rng = np.random.default_rng(14)
    active = jnp.asarray(rng.random((2, 30, 48)) < 0.05)
    active = active.at[1, 20:].set(False)  # padding
    execution = Execution(tile, 8, exact=exact, ordered=ordered, implementation="xla")
    ours = jax.jit(partial(kernels.sparse_ffn, execution=execution))(x, weights, active)
    asked = kernels.ffn(x, *weights, active)
    if exact:
        close(ours[0], asked[0])
        close(ours[1, :20], asked[1, :20])
    elif not ordered:
        needed = kernels.any_per_tile(active, tile or 30, 12)
        close(ours, definition(x, weights, needed, tile or 30))
    dense = kernels.ffn(x, *weights)
    error, asked_error = (np.linalg.norm((y - dense)[0]) for y in (ours, asked))
    assert error <= asked_error * 1.0001  # a superset of what is asked for


def test_capacities_are_few_and_ascending():
    assert capacities(32) == (2, 4, 6, 8, 12, 16, 24)
    assert capacities(4) == (1, 2, 3)
    assert capacities(1) == ()


def test_bad_arguments_are_named():
    x, weights, needed = random_case(15)
    run = partial(kernels.block_sparse_ffn, x, weights)
    for call, message in [
        (lambda: run(needed, 16, implementation="triton"), "no implementation 'triton'.*reference, xla, mosaic_tpu"),
        (lambda: run(needed, 0), "at least 1 token, not 0"),
        (lambda: run(needed, 8), r"tiles of 8 tokens need a bool map \(5, 'B'\), not bool \(3, 12\)"),
        (lambda: run(needed.astype(int), 16), "not int32"),
        (lambda: run(needed[:, :7], 16), "96 hidden neurons cannot be divided into 7 blocks"),
        (lambda: run(needed, 16, active=jnp.ones((37, 18), bool)), "multiple of 12 blocks"),
        (lambda: run(kernels.mask_to_indices(needed), 16), "name `blocks`"),
        (lambda: kernels.block_sparse_ffn(x[:, :5], weights, needed, 16), "do not fit inputs of 5 features"),
        (lambda: kernels.sparse_ffn(x[None], weights, jnp.ones((1, 37, 12), bool), Execution(8, 7)), "blocks of 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def ffn_shape(tile_size=16, tokens=1050, block_size=64, dtype="float32", d_model=256, hidden=2048):
    return FFNShape(jnp.dtype(dtype), tile_size, d_model, hidden, block_size, tokens)


def test_the_choice_depends_on_the_device():
    chosen = choose(ffn_shape())
    assert chosen.backend.name == "xla"
    assert chosen.break_even == break_even(chosen.backend, "cpu", ffn_shape())
    assert choose(ffn_shape(), "xla").break_even is None  # forced
    assert tuning_path("NVIDIA H200").name == "nvidia-h200.json"
    assert 0 < break_even(chosen.backend, "a device that nobody tuned", ffn_shape()) < 1


@pytest.mark.parametrize(
    ("device", "dtype", "group_size", "expected"),
    [
        *((("tpu", "float32", 8, ("mosaic_tpu", 8)), ("tpu", "bfloat16", 8, ("mosaic_tpu", 16)))),
        *((("tpu", "bfloat16", 32, ("mosaic_tpu", 32)), ("tpu", "float32", 1, ("mosaic_tpu", 8)))),
        *((("gpu", "bfloat16", 8, ("mosaic_gpu", 8)), ("gpu", "bfloat16", 1, ("mosaic_gpu", 8)))),
        *((("gpu", "bfloat16", 24, ("xla", 24)), ("gpu", "bfloat16", 64, ("mosaic_gpu", 64)))),
        *((("gpu", "float32", 16, ("xla", 16)), ("cpu", "float32", 8, ("xla", 8)))),
    ],
)
def test_blocks_are_whole_groups_that_the_back_end_takes(device, dtype, group_size, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: device)
    of_device = SimpleNamespace(device_kind="untuned", compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda: [of_device])
    hidden = 2048 if group_size != 24 else 1536
    chosen = choose(ffn_shape(dtype=dtype, hidden=hidden), group_size=group_size)
    assert (chosen.backend.name, chosen.block_size) == expected
    if chosen.backend.name == "xla" and device == "gpu":
        ((name, reason),) = chosen.refused
        assert name == "mosaic_gpu" and ("not in float32" in reason or "blocks of 24 neurons" in reason)
    else:
        assert chosen.refused == ()


def test_the_size_of_blocks_is_that_of_the_groups():
    x, weights, _ = random_case(16, batch=(1,))
    active = jnp.asarray(np.random.default_rng(16).random((1, 37, 6)) < 0.3)
    for implementation in ("xla", None):
        execution = Execution(implementation=implementation)
        assert execution.dispatch(x, 96, 6).block_size == 16
        needed = kernels.any_per_tile(active, 37, 6)
        close(kernels.sparse_ffn(x, weights, active, execution), definition(x, weights, needed, 37))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("implementation", [*HERE, None])
def test_outputs_have_the_type_of_the_inputs(dtype, implementation):
    """Every branch of every switch, whatever the type of the weights."""
    x, weights, needed = random_case(17, dtype=dtype)
    weights = weights._replace(b_out=weights.b_out.astype(jnp.float32))
    ours = kernels.block_sparse_ffn(x, weights, needed, 16, implementation=implementation)
    assert ours.dtype == dtype
    close(ours, definition(x, weights, needed, 16), jnp.bfloat16)


def test_break_even_is_of_the_nearest_size_that_was_measured(tmp_path, monkeypatch):
    measured = [
        {"tile_size": 64, "tokens": 1050, "density": 0.25},
        {"tile_size": 64, "tokens": 33600, "density": 0.5},
        {"tile_size": 1050, "tokens": 1050, "density": 1.0},
    ]
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"break_even": {"xla": measured}}))
    monkeypatch.setattr("detr_jax.kernels.dispatch.tuning_path", lambda kind: path)
    for tile_size, tokens, expected in (
        *((1, 1, 0.25), (64, 1050, 0.25), (100, 5000, 0.25), (64, 8400, 0.5), (128, 10**6, 0.5)),
        *((1050, 1050, 1.0), (1050, 33600, 1.0), (300, 300, 1.0)),
    ):
        assert break_even(xla.BACKEND, "tuned", ffn_shape(tile_size, tokens)) == expected
    assert break_even(mosaic_gpu.BACKEND, "tuned", ffn_shape()) == mosaic_gpu.BACKEND.break_even


def test_break_even_densities_are_of_one_ffn(tmp_path, monkeypatch):
    """Blocks, sizes and type count, too."""
    sizes = {"tile_size": 64, "tokens": 1050, "block_size": 64, "d_model": 256, "hidden": 2048, "dtype": "float32"}
    others = [{}, {"block_size": 8}, {"d_model": 128}, {"hidden": 1024}, {"dtype": "bfloat16"}]
    measured = [sizes | other | {"density": i / 10} for i, other in enumerate(others)]
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"break_even": {"xla": measured}}))
    monkeypatch.setattr("detr_jax.kernels.dispatch.tuning_path", lambda kind: path)
    for i, other in enumerate(others):
        assert break_even(xla.BACKEND, "tuned", ffn_shape(**{"tile_size": 64} | other)) == i / 10
