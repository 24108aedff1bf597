"""Many devices give what one gives: eight of one process, and four of each of two, one of which is killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from commands import cpu_devices
from jax.sharding import AbstractMesh
from mesh_job import EPOCHS
from processes import finish, kill_after_checkpoint, start, start_two
from tiny import TINY_CONFIG, annotation, tiny_detector, write_coco

import detr_jax
from detr_jax.calibration.inputs import draw_inputs
from detr_jax.data.batches import ImageBatches
from detr_jax.data.coco import CocoDataset
from detr_jax.data.loading import batches
from detr_jax.mesh import AXIS, join_cluster, local_slice, mesh_of, replicate
from detr_jax.models.ffn import forward
from detr_jax.plan import load_plan

TESTS = Path(__file__).parent
EIGHT = AbstractMesh((8,), (AXIS,))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A detector and a data set whose images do not fill the last batch."""
    root = tmp_path_factory.mktemp("inputs")
    boxes = [annotation(i, 1 + i % 11, (2 * i, i, 10 + i, 12), category_id=1 + i % 2) for i in range(1, 12)]
    for split in ("train2017", "val2017"):
        write_coco(root, [(32, 40)] * 11, boxes, split)
    detr_jax.save(tiny_detector(), root / "detector.safetensors")
    return root


def job(inputs: Path, out: Path, *options: str) -> list[object]:
    return [TESTS / "mesh_job.py", inputs, out, *options]


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """Output folders of a run on one device, and of one on eight."""
    root = tmp_path_factory.mktemp("runs")
    outs = {count: root / str(count) for count in (1, 8)}
    processes = {count: start(job(inputs, out), out, count) for count, out in outs.items()}
    return [finish(outs[count], process) for count, process in processes.items()]


def assert_same(one: Path, other: Path) -> None:
    """Compares all that two runs measured; sums of floats are added up in another order."""
    plans = [safetensors.numpy.load_file(out / "plan.safetensors") for out in (one, other)]
    profiles = [safetensors.numpy.load_file(out / "activations.safetensors") for out in (one, other)]
    found = [dict(np.load(out / "found.npz")) for out in (one, other)]
    for first, second in (plans, profiles, found):
        assert first.keys() == second.keys() and first
        for name, array in first.items():
            if np.issubdtype(array.dtype, np.integer):
                np.testing.assert_array_equal(array, second[name], err_msg=name)
            else:
                np.testing.assert_allclose(array, second[name], rtol=1e-4, atol=1e-4, err_msg=name)
    results = [json.loads((out / "results.json").read_text())["runs"] for out in (one, other)]
    for first, second in zip(*(jax.tree.leaves(r) for r in results), strict=True):
        assert first == pytest.approx(second, abs=1e-4)


def assert_same_experts(inputs: Path, one: Path, other: Path) -> None:
    """Compares the neurons that experts compute for images that they were not fitted to, and their outputs.

    The decoder's inputs differ by a thousandth of their size, so that rounding is up to 1e-3 of what the regressions of
    few tokens see. Experts of equal width have no certain order.
    """
    model, images = detr_jax.load(inputs / "detector.safetensors"), CocoDataset(inputs, "val2017")
    drawn = draw_inputs(model, ImageBatches(model, images, 11).batches(), 2**16, len(images), seed=0)
    plans = [load_plan(out / "experts" / "plan.safetensors", model).selectors for out in (one, other)]
    for name, weights in model.ffn_weights().items():
        x, tokens = drawn[name][None], np.ones((1, len(drawn[name])), bool)
        selections = [plan[name](weights, x, tokens) for plan in plans]
        kept = [np.asarray(selection.per_token(tokens.shape, len(weights.w_in))) for selection in selections]
        assert (kept[0] == kept[1]).all(-1).mean() > 0.95 and kept[0].any(), name
        outputs = [np.asarray(forward(weights, x, selection)) for selection in selections]
        missed, variance = np.square(outputs[0] - outputs[1]).mean(), outputs[0].var((0, 1)).mean()
        assert missed < 0.02**2 * variance, name


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(inputs, runs):
    one, eight = runs
    assert_same(one, eight)
    assert_same_experts(inputs, one, eight)
    assert [json.loads((out / "results.json").read_text())["devices"] for out in runs] == [1, 8]


@pytest.mark.slow
def test_two_processes_give_what_one_device_gives_though_one_was_killed(inputs, runs, tmp_path):
    kept = kill_after_checkpoint(start_two(job(inputs, tmp_path), tmp_path), tmp_path / "checkpoints")
    assert 5 <= kept < EPOCHS and not (tmp_path / "plan.safetensors").exists()

    assert_same(runs[0], finish(tmp_path, *start_two(job(inputs, tmp_path, "--resume"), tmp_path)))
    assert_same_experts(inputs, runs[0], tmp_path)
    # The first process speaks for all.
    assert "all gated" in (tmp_path / "log-0.txt").read_text()
    assert "all gated" not in (tmp_path / "log-1.txt").read_text()


def test_hosts_load_their_own_images_of_the_same_batch(inputs, monkeypatch):
    dataset = CocoDataset(inputs, "val2017")
    whole = list(batches(dataset, TINY_CONFIG.preprocessing, 8))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    parts = []
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        parts.append(list(batches(dataset, TINY_CONFIG.preprocessing, 8, mesh=EIGHT)))
    assert len(whole) == len(parts[0]) == len(parts[1]) == 2 and whole[1].valid.sum() == 3
    for batch, *own in zip(whole, *parts, strict=True):
        for name in ("pixel_values", "pixel_mask"):
            halves = [getattr(part, name) for part in own]
            assert [len(half) for half in halves] == [4, 4]
            np.testing.assert_array_equal(np.concatenate(halves), getattr(batch, name))
        for name in ("image_ids", "sizes", "valid"):
            for part in own:
                np.testing.assert_array_equal(getattr(part, name), getattr(batch, name))
        assert [part.own for part in own] == [slice(0, 4), slice(4, 8)]
        np.testing.assert_array_equal(np.concatenate(own[0].boxes + own[1].boxes), np.concatenate(batch.boxes))


def test_a_batch_that_devices_cannot_share_is_refused(inputs):
    with pytest.raises(ValueError, match=r"12 images cannot be shared by 8 devices.* multiple of 8"):
        local_slice(EIGHT, 12)
    with pytest.raises(ValueError, match="6 images cannot be shared by 8 devices"):
        batches(CocoDataset(inputs, "val2017"), TINY_CONFIG.preprocessing, 6, mesh=EIGHT)
    assert local_slice(None, 12) == slice(0, 12)


def test_a_single_device_and_a_single_host_are_left_alone(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_STEP_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    join_cluster()
    assert not jax.distributed.is_initialized()
    model = tiny_detector()
    assert replicate(model) is model and mesh_of(model) is None


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, "JAX_COORDINATOR_ADDRESS without .*JAX_NUM_PROCESSES"),
        ({"JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "2"}, "without JAX_COORDINATOR_ADDRESS: set all three or none"),
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES is 'two', not a number",
        ),
    ],
)
def test_half_a_cluster_is_refused(monkeypatch, variables, message):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        join_cluster()


def test_arrays_on_an_explicit_mesh_give_the_same_outputs():
    code = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tiny import TINY_CONFIG, tiny_detector
from detr_jax.kernels import Execution
from detr_jax.methods import Oracle, executed

model, images = tiny_detector(), np.random.default_rng(0).standard_normal((2, 32, 40, 3)).astype(np.float32)
mesh = jax.make_mesh((2,), ("data",))
assert mesh.axis_types == (jax.sharding.AxisType.Explicit,)
shared = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
run = jax.jit(lambda model, images, selectors: model(images, selectors=selectors).logits)
np.testing.assert_allclose(run(model, shared, {}), run(model, images, {}), atol=1e-5)
with jax.set_mesh(mesh):
    sparse = executed(dict.fromkeys(TINY_CONFIG.ffn_names, Oracle(4)), Execution())
    np.testing.assert_allclose(run(model, shared, sparse), run(model, images, {}), atol=1e-5)
    np.testing.assert_allclose(model(shared).logits, run(model, images, {}), atol=1e-5)
"""
    environment = os.environ | cpu_devices(2) | {"PYTHONPATH": str(TESTS)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_a_single_process_joins_no_cluster(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_STEP_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    join_cluster()
    assert not jax.distributed.is_initialized()
