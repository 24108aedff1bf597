"""The comparison as a command: its results, its refusals, and resuming after an interruption."""

import json

import compare_selectors
import numpy as np
import pytest
import tyro
from commands import refusal, run
from fixtures_coco import varied_detector
from PIL import Image
from report_checks import read_report
from studies.common import open_splits
from toy_method import LargestInput

import detr_jax
from detr_jax.commands.reports import SAMPLES
from detr_jax.plan import load_plan

METHODS = ["static-contribution", "mgs", "core", "rsparse", LargestInput.name]
"""The last one registers itself from outside the package."""
SCRIPT = "compare_selectors.py"


SIZES = ["--calibration-images", 2, "--allocation-images", 2, "--eval-images", 4, "--eval-batch-size", 2]
SIZES += ["--group-size", 4, "--batch-size", 2, "--epochs", 2, "--tuning-epochs", 1]
SETTINGS = ["--densities", 0.5, "--mgs-density", 0.5, "--sibs-taus", 0.9, "--sibs-indicators", 4]


@pytest.fixture(scope="module")
def inputs(mixed_shapes, tmp_path_factory):
    """The four photographs of one of the three shapes: each shape is another compilation of every selector."""
    root = tmp_path_factory.mktemp("one_shape")
    (root / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (root / split).symlink_to(mixed_shapes.coco / split)
        content = json.loads((mixed_shapes.coco / f"annotations/instances_{split}.json").read_text())
        images = [image for image in content["images"] if (image["height"], image["width"]) == (32, 40)]
        ids = {image["id"] for image in images}
        objects = [one for one in content["annotations"] if one["image_id"] in ids]
        path = root / f"annotations/instances_{split}.json"
        path.write_text(json.dumps(content | {"images": images, "annotations": objects}))
    return ["--model", mixed_shapes.model, "--coco", root, *SIZES, *SETTINGS, "--methods", *METHODS]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    run(SCRIPT, *inputs, "--out", out)
    return out


def test_it_measures_every_selector(finished):
    results = json.loads((finished / "results.json").read_text())
    rows = results["rows"]
    assert [row["selector"] for row in rows if row["section"] == "methods"] == METHODS
    assert {row["section"] for row in rows} == {"dense", "bounds", "mgs", "layers", "sibs", "methods"}
    for row in rows[1:]:
        assert {"needs", "granularity", "saves", "dynamic", "trained", "order", "group_size"} <= set(row)
        low, high = row["AP_minus_dense_interval"]
        assert low <= high and 0 < row["flops_share"]["detector"] < 2
    static = next(row for row in rows if row["selector"] == METHODS[0])
    assert static["density"] == pytest.approx(0.5, abs=0.15) and not static["dynamic"]
    assert results["fingerprint"] == detr_jax.fingerprint(varied_detector())
    text = (finished / "comparison.md").read_text()
    assert all(f"| {name} " in text for name in METHODS) and "2510.09380" in text
    for name in ("accuracy", "sizes", "tile_density", "activations", "layers"):
        assert min(Image.open(finished / f"{name}.png").size) > 300


def test_the_report_has_all_tables_and_figures(finished):
    page = read_report(finished / "report.html")
    text = (finished / "comparison.md").read_text()
    assert [title for title in page.texts["h2"] if f"\n## {title}\n" in text] == page.texts["h2"][2:8]
    assert text.count("\n|--") == sum(tag == "table" for tag, _ in page.elements) - SAMPLES
    assert len(page.all("src")) == len(compare_selectors.FIGURES) + SAMPLES * 4


def test_photographs_of_three_shapes(mixed_shapes, tmp_path):
    """All that is measured before the rows, and a method; all of the command is a slow test."""
    options = ["--model", mixed_shapes.model, "--coco", mixed_shapes.coco, *SIZES, *SETTINGS]
    options += ["--eval-images", 3, "--calibration-images", 3, "--methods", METHODS[0], "--out", tmp_path]
    arguments = tyro.cli(compare_selectors.Arguments, args=[str(option) for option in options])
    model = varied_detector()
    splits = open_splits(arguments.data, model, arguments.train_images, 3, 3)
    bench = compare_selectors.Workbench(arguments, model, splits)
    assert len({grid for batch in bench.validation for grid in batch.grids}) == 3
    compare_selectors.compare_methods(bench, {})
    bench.finish_rows()
    (row,) = bench.rows.by_key.values()
    assert row["selector"] == METHODS[0] and 0.3 < row["density"] < 0.7 and row["AP_minus_dense"] <= 0


@pytest.mark.slow
def test_the_command_on_photographs_of_three_shapes(mixed_shapes, tmp_path):
    run(SCRIPT, *mixed_shapes.options, *SIZES, *SETTINGS, "--methods", *METHODS, "--eval-images", 3, "--out", tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["selector"] for row in rows if row["section"] == "methods"] == METHODS


def test_it_keeps_the_best_gates_as_a_plan(finished):
    model = varied_detector()
    plan = load_plan(finished / "plan.safetensors", model)
    assert set(plan.selectors) == set(plan.permutations) == set(model.config.ffn_names)
    assert "trained with the others on" in plan.measured["setting"]


@pytest.mark.slow
def test_an_interrupted_comparison_resumes(inputs, finished, tmp_path, monkeypatch):
    from detr_jax.evaluation.comparison import Comparison

    row, seen = Comparison.row, []

    def interrupted(self, selectors, measured):
        seen.append(selectors)
        if len(seen) == 12:
            raise OSError("interrupted")
        return row(self, selectors, measured)

    monkeypatch.setattr(Comparison, "row", interrupted)
    with pytest.raises(OSError, match="interrupted"):
        run(SCRIPT, *inputs, "--out", tmp_path)
    assert len(json.loads((tmp_path / "progress.json").read_text())) == 11
    run(SCRIPT, *inputs, "--out", tmp_path, "--resume")
    whole, resumed = (json.loads((out / "results.json").read_text())["rows"] for out in (finished, tmp_path))
    assert len(seen) == 1 + len(whole)
    for one, other in zip(whole, resumed, strict=True):
        assert one["setting"] == other["setting"]
        np.testing.assert_allclose(one["numbers"]["AP"], other["numbers"]["AP"], atol=1e-9)
        assert one["ffns"] == other["ffns"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "holds a finished run"),
        (["--methods", "mgs", "magic"], "there are no selectors ['magic']; there are mgs, "),
        (["--densities", "1.5"], "densities must be from 0.01 to below 1, not 1.5"),
        (["--allocation-images", "5"], "from 1 to --calibration-images 2, not 5"),
        (["--calibration-images", "4"], "too few to hold out 4"),
        (["--group-size", "5"], "32 hidden neurons cannot be divided into groups of 5"),
    ],
)
def test_it_refuses_with_one_line(inputs, finished, capsys, extra, message):
    assert message in refusal(capsys, SCRIPT, *inputs, "--out", finished, *extra)
