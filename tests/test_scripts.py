import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import device_time
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import annotation, tiny_detector, write_coco

import detr_jax
from detr_jax.evaluation.padding import padding_effect
from detr_jax.kernels import Execution
from detr_jax.methods import Executed, LinearGate, Oracle, PartitionedSelector, Thresholded, executed
from detr_jax.plan import Plan, save_plan

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    detr_jax.save(tiny_detector(), path)
    return path


@pytest.fixture
def coco(tmp_path):
    return write_coco(tmp_path / "coco", [(20, 30), (30, 20), (16, 16)], [annotation(1, 1, (1, 2, 10, 12))])


@pytest.fixture
def script(monkeypatch):
    """Runs a script as from the command line; returns its exit status."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        except SystemExit as stop:
            return stop.code
        return 0

    return run


def refused(capsys):
    """The one line on stderr that tells what was wrong."""
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_evaluate_on_coco(script, checkpoint, coco, tmp_path, capsys):
    out = tmp_path / "runs/result.json"
    arguments = ("--model", checkpoint, "--coco", coco, "--split", "val2017", "--batch-size", 2, "--out", out)
    assert script("evaluate.py", *arguments, "--padding-report", 2) == 0
    printed = capsys.readouterr()
    assert "AP75" in printed.out
    assert "absolute change" in printed.out
    assert "warning" not in printed.err
    report = json.loads(out.read_text())
    assert (report["data"], report["images"], report["padding"]["images"]) == ("val2017", 3, 2)
    assert report["implementation"] == "dense" and report["AP_minus_dense"] is None
    assert len(report["numbers"]) == 12
    assert len(report["AP_interval"]) == 2
    assert report["arguments"]["batch_size"] == 2
    assert "jax" in report["versions"]

    before = out.read_bytes()
    assert script("evaluate.py", *arguments) == 2
    assert "exists" in refused(capsys)
    assert out.read_bytes() == before
    assert script("evaluate.py", *arguments, "--overwrite", "--images", 1, "--exact-shapes") == 0
    assert json.loads(out.read_text())["images"] == 1


@pytest.fixture(scope="module")
def plan(checkpoint, tmp_path_factory):
    """A plan that is computed by the XLA implementation."""
    model, rng = detr_jax.load(checkpoint), np.random.default_rng(0)
    gates = {
        name: Thresholded(LinearGate(jnp.asarray(rng.normal(0, 1, (16, 4)), jnp.float32), jnp.zeros(4)), jnp.float32(0))
        for name in model.config.ffn_names
    }
    selectors = executed(gates, Execution(block_size=8, implementation="xla"))
    path = tmp_path_factory.mktemp("plan") / "plan.safetensors"
    save_plan(Plan("mgs", detr_jax.fingerprint(model), selectors, {}, {}, {}, {}), path)
    return path


def test_evaluate_needs_images_in_a_batch(script, checkpoint, coco, tmp_path, capsys):
    arguments = ("--model", checkpoint, "--coco", coco, "--batch-size", 0, "--out", tmp_path / "result.json")
    assert script("evaluate.py", *arguments) == 2
    assert "at least one image" in refused(capsys)


def test_evaluate_with_a_plan(script, checkpoint, plan, tmp_path, capsys):
    sizes = [(32, 45), (45, 32), (32, 32)]  # two of which are padded
    coco = write_coco(tmp_path / "coco", sizes, [annotation(1, 1, (1, 2, 10, 12))])
    arguments = ("--model", checkpoint, "--data", f"coco:{coco}", "--batch-size", 2, "--out", tmp_path / "a.json")
    assert script("evaluate.py", *arguments, "--plan", plan.parent, "--padding-report", 2) == 0
    printed = capsys.readouterr().out
    assert "minus dense" in printed and "encoder.0, decoder.0: xla" in printed
    report = json.loads((tmp_path / "a.json").read_text())
    # As the plan says, unless told otherwise.
    assert report["implementation"] == "plan" and report["execution"]["encoder.0"]["implementation"] == "xla"
    assert 0 < report["density"] <= report["executed_density"] <= 1
    low, high = report["AP_minus_dense_interval"]
    assert low <= report["AP_minus_dense"] == report["numbers"]["AP"] - report["dense_AP"] <= high
    # Padding is measured for what runs.
    data = detr_jax.open_dataset(f"coco:{coco}", "val", 2)
    sparse, dense = detr_jax.load_sparse(checkpoint, plan), detr_jax.load(checkpoint)
    assert report["padding"]["change"] == padding_effect(sparse, data, 2)["change"]
    assert report["padding"]["change"] != padding_effect(dense, data, 2)["change"]

    masked = (*arguments, "--overwrite", "--plan", plan, "--implementation", "masked")
    assert script("evaluate.py", *masked) == 0
    again = json.loads((tmp_path / "a.json").read_text())
    assert again["execution"]["encoder.0"]["implementation"] == "masked" and again["executed_density"] == 1
    assert again["density"] == report["density"]


def test_evaluate_on_photographs_without_annotations(script, checkpoint, plan, coco, tmp_path, capsys):
    out = tmp_path / "result.json"
    data = ("--data", f"images:{coco / 'val2017'}", "--split", "all", "--padding-report", 1)
    assert script("evaluate.py", "--model", checkpoint, *data, "--plan", plan, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "AP is undefined" in printed and "output divergence" in printed
    report = json.loads(out.read_text())
    assert report["numbers"] is None and report["padding"]["AP"] is None
    assert report["divergence"] > 0 and report["images"] == 3


def test_evaluate_where_no_object_defines_ap(script, checkpoint, tmp_path, capsys):
    coco, out = write_coco(tmp_path / "coco", [(20, 30)], []), tmp_path / "result.json"
    assert script("evaluate.py", "--model", checkpoint, "--coco", coco, "--out", out) == 0
    assert "AP is undefined" in capsys.readouterr().out
    assert json.loads(out.read_text())["numbers"] is None


def test_evaluate_and_detect_with_the_plan_of_the_embedded_detector(script, tmp_path, capsys):
    out = tmp_path / "result.json"
    assert script("evaluate.py", "--plan", "detr-tiny", "--images", 2, "--batch-size", 2, "--out", out) == 0
    assert json.loads(out.read_text())["density"] < 0.3
    photograph = tmp_path / "photo.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(photograph)
    assert script("detect.py", photograph, "--plan", "detr-tiny", "--out", tmp_path / "found") == 0
    assert "detr-tiny knows only the shapes of generated scenes" in capsys.readouterr().err
    assert json.loads((tmp_path / "found/photo.json").read_text())["plan"] == "detr-tiny"


def test_evaluate_refuses_data_of_which_the_detector_knows_no_class(script, checkpoint, tmp_path, capsys):
    assert script("evaluate.py", "--model", checkpoint, "--images", 3, "--out", tmp_path / "result.json") == 2
    assert "the detector knows none of the data's categories" in refused(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--coco", "nowhere"), "nowhere"),
        (("--images", "0"), "asked for 0"),
        (("--padding-report", "601"), "asked for 601"),
        (("--model", "nothing.safetensors"), "nothing.safetensors"),
        (("--split", "train"), "no end of training scenes"),
        (("--data", "images:a", "--coco", "b"), "--coco b is short for"),
        (("--implementation", "xla"), "needs a --plan"),
        (("--plan", "nothing.safetensors"), "nothing.safetensors"),
    ],
)
def test_evaluate_tells_what_is_wrong(script, checkpoint, tmp_path, capsys, arguments, message):
    out = tmp_path / "result.json"
    images = () if "--split" in arguments else ("--images", 2)
    assert script("evaluate.py", "--model", checkpoint, *images, "--out", out, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_detect(script, checkpoint, tmp_path, capsys):
    images = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for path, size in zip(images, ((50, 40), (128, 128)), strict=True):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(path)
    out = tmp_path / "found"
    arguments = (*images, "--model", checkpoint, "--threshold", 0, "--out", out)
    assert script("detect.py", *arguments) == 0
    assert {path.name for path in out.iterdir()} == {"a.png", "a.json", "b.png", "b.json"}
    report = json.loads((out / "a.json").read_text())
    assert report["image"] == str(images[0])
    scores = [found["score"] for found in report["detections"]]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)
    assert set(report["detections"][0]) == {"label", "score", "box"}
    assert Image.open(out / "b.png").size == (640, 640)

    capsys.readouterr()
    assert script("detect.py", *arguments) == 2
    assert "a.png exists" in refused(capsys)
    assert script("detect.py", *arguments, "--overwrite") == 0


def test_detect_goes_on_after_a_name_that_is_not_utf8(checkpoint, tmp_path):
    image = Image.fromarray(np.zeros((32, 32, 3), np.uint8))
    paths = [tmp_path / "caf\udce9.png", tmp_path / "\u00e9t\u00e9.png"]
    for path in paths:
        image.save(path)
    command = [sys.executable, ROOT / "scripts/detect.py", *paths, "--model", checkpoint, "--out", tmp_path / "found"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "caf?.png: 0 objects" in process.stdout and "?t?.png: 0 objects" in process.stdout
    assert sum(path.suffix == ".json" for path in (tmp_path / "found").iterdir()) == 2


def test_detect_tells_what_is_wrong(script, checkpoint, tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "text.png").write_text("no image")
    out = ("--model", checkpoint, "--out", tmp_path / "found")
    for images, message in (
        ((), "--scenes 4"),
        ((tmp_path / "missing.jpg",), "missing.jpg"),
        ((tmp_path / "text.jpg",), "text.jpg as an image"),
        ((tmp_path / "text.jpg", tmp_path / "text.png"), "2 images are named text"),
    ):
        assert script("detect.py", *images, *out) == 2
        assert message in refused(capsys)
    assert not (tmp_path / "found").exists()
    assert script("detect.py", tmp_path / "text.jpg", *out, "--threshold", 70) == 2
    assert "from 0 to 1, not 70" in refused(capsys)
    replicate_like = ("--model", checkpoint, "--out", tmp_path, "--overwrite")
    assert script("detect.py", tmp_path / "text.png", *replicate_like) == 2
    assert "text.png is one of the images" in refused(capsys)
    assert (tmp_path / "text.png").read_text() == "no image"


def test_benchmark(script, tmp_path, capsys):
    out = tmp_path / "benchmark.json"
    sizes = ("--preset", "detr-tiny", "--height", 64, "--width", 96, "--repeats", 1)
    assert script("benchmarks/dense.py", *sizes, "--out", out) == 0
    report = json.loads(out.read_text())
    assert {"ours", "ours, backbone", "ours, transformer"} <= set(report["medians"])
    assert all(median > 0 for median in report["medians"].values())
    assert "peak memory of ours" in capsys.readouterr().out
    assert script("benchmarks/dense.py", *sizes, "--out", out) == 2
    assert "exists" in refused(capsys)


def test_benchmark_of_narrow_experts(script, tmp_path, capsys):
    out = tmp_path / "routed.json"
    sizes = ("--d-model", 16, "--hidden", 128, "--tokens", 40, 70, "--experts", 1, 5, "--densities", 0.3)
    assert script("benchmarks/routed_kernels.py", *sizes, "--repeats", 1, "--out", out) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["tokens"], row["experts"]) for row in rows] == [(40, 1), (40, 5), (70, 1), (70, 5)]
    for row in rows:
        assert row["implementation"] == "xla" and row["error"] < 1e-5 and len(row["widths"]) == row["experts"]
        assert row["density"] == pytest.approx(0.3, abs=0.05) and row["executed"] >= row["density"]
        assert row["faster_than_dense"]["experts"] == row["medians"]["dense"] / row["medians"]["experts"]
    assert len(set(rows[1]["widths"])) > 1
    assert "experts x" in capsys.readouterr().out
    assert script("benchmarks/routed_kernels.py", *sizes, "--out", out) == 2
    assert "exists" in refused(capsys)
    for wrong, message in ((("--experts", 0), "must be at least 1"), (("--densities", 2), "above 0 and at most 1")):
        assert script("benchmarks/routed_kernels.py", *wrong, "--out", tmp_path / "new.json") == 2
        assert message in refused(capsys)


def test_benchmark_kernels(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("detr_jax.kernels.dispatch.tuning_path", lambda kind: tmp_path / "tuning" / f"{kind}.json")
    # The real ceilings take a CPU seconds.
    monkeypatch.setattr(device_time, "peaks", lambda *_: device_time.Ceilings(1e9, 1e9, "host"))
    out = tmp_path / "kernels.json"
    sizes = ("--tokens", 20, "--d-model", 16, "--hidden", 64, "--block-size", 8, "--tile-sizes", 0, 8, "--repeats", 1)
    rows = ("--gates", "tile", "--densities", 0, 0.3, 1)
    assert script("benchmarks/sparse_kernels.py", *sizes, *rows, "--out", out, "--write-tuning") == 0
    report = json.loads(out.read_text())
    assert len(report["rows"]) == 2 * 3 and not report["left_out"]
    assert max(report["errors"].values()) < 1e-5 and report["errors"].keys() == {"reference", "xla"}
    for row in report["rows"]:
        assert max(row["errors"].values()) < 1e-5
        assert row["faster_than_dense"]["xla"] == row["medians"]["dense"] / row["medians"]["xla"]
        assert row["flops_per_second"]["dense"] == 4 * 20 * 16 * 64 / row["medians"]["dense"]
        assert row["bytes_per_second"]["dense"] == 4 * 16 * (2 * 20 + 2 * 64) / row["medians"]["dense"]
    assert {0.0, 1.0} <= {row["density"] for row in report["rows"]}
    assert "break-even density: xla, tile_size 8, tokens 20" in capsys.readouterr().out
    (tuning,) = (tmp_path / "tuning").iterdir()
    assert json.loads(tuning.read_text())["break_even"] == report["break_even"]
    assert [entry["tile_size"] for entry in report["break_even"]["xla"]] == [8, 20]
    new = tmp_path / "new.json"
    correlated = ("--gates", "token", "--density-of", "tokens", "--correlations", 0.9, "--orders", "given", "signature")
    assert (
        script("benchmarks/sparse_kernels.py", *sizes, "--tile-sizes", 8, *correlated, "--densities", 0.1, "--out", new)
        == 0
    )
    rows = json.loads(new.read_text())["rows"]
    assert [row["order"] for row in rows] == ["given", "signature"]
    assert all(0.09 < row["gate_density"] < 0.11 < row["density"] for row in rows)


def test_benchmark_kernels_leaves_out_what_does_not_fit_its_time(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(device_time, "peaks", lambda *_: device_time.Ceilings(1e9, 1e9, "host"))
    monkeypatch.setattr("deadline.Deadline.leaves", lambda self, seconds: not seconds)
    out = tmp_path / "kernels.json"
    sizes = ("--tokens", 20, "--d-model", 16, "--hidden", 64, "--block-size", 8, "--tile-sizes", 8, "--repeats", 1)
    rows = ("--gates", "tile", "--densities", 0.5, 1)
    assert script("benchmarks/sparse_kernels.py", *sizes, *rows, "--minutes", 9, "--out", out) == 0
    report = json.loads(out.read_text())
    assert len(report["rows"]) == 1 and [row["asked"] for row in report["left_out"]] == [1.0]
    left_out = "left out, because the time was up: tokens 20, tile_size 8, gate tile, order given, asked 1.0"
    assert left_out in capsys.readouterr().out


def test_benchmark_kernels_refuses(script, tmp_path, capsys):
    out = tmp_path / "kernels.json"
    for arguments, message in (
        (("--block-size", 60), "2048 hidden neurons cannot be divided into blocks of 60"),
        (("--densities", 1.5), "densities must be from 0 to 1, not 1.5"),
        (("--orders", "signature"), "need gates that decide for tokens"),
        (("--density-of", "tokens"), "need gates that decide for tokens"),
    ):
        assert script("benchmarks/sparse_kernels.py", *arguments, "--out", out) == 2
        assert message in refused(capsys)
    out.write_text("{}")
    assert script("benchmarks/sparse_kernels.py", "--out", out) == 2
    assert "exists" in refused(capsys)


def test_benchmark_plan(script, checkpoint, tmp_path, capsys):
    model = detr_jax.load(checkpoint)
    plan = tmp_path / "plan.safetensors"
    selectors = dict.fromkeys(model.config.ffn_names, Oracle(8))
    selectors["encoder.0"] = Executed(PartitionedSelector(None, 8), Execution())  # as a search makes it
    save_plan(Plan("oracle", detr_jax.fingerprint(model), selectors, {}, {}, {}, {}), plan)
    arguments = ("--model", checkpoint, "--plan", plan, "--images", 2, "--repeats", 1, "--out", tmp_path / "times.json")
    sizes = ("--block-sizes", 8, "--tile-sizes", 0, 4)
    assert script("benchmarks/plan.py", *arguments, *sizes, "--orders", "given", "signature") == 0
    rows = json.loads((tmp_path / "times.json").read_text())["rows"]
    assert len(rows) == 4 * len(selectors)
    given, signature = ([r["density"] for r in rows if r["order"] == o] for o in ("given", "signature"))
    assert given[::2] == signature[::2]  # one tile holds all tokens in any order
    for row in rows:
        assert 0 <= row["group_density"] <= row["density"] <= 1
        assert row["faster_than_dense"] == row["seconds"]["dense"] / row["seconds"]["sparse"] > 0
    assert "all FFNs, image x 8, ordered" in capsys.readouterr().out
    assert script("benchmarks/plan.py", *arguments, "--overwrite", "--block-sizes", 7) == 2
    assert "hidden neurons cannot be divided into blocks of 7" in refused(capsys)


@pytest.mark.parametrize(
    "name",
    [
        "evaluate.py",
        "detect.py",
        "benchmarks/dense.py",
        "benchmarks/sparse_kernels.py",
        "benchmarks/plan.py",
        "search_plan.py",
    ],
)
def test_help(script, name, capsys):
    assert script(name, "--help") == 0
    assert "--overwrite" in capsys.readouterr().out
