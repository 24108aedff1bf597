"""Commands on photographs of three padded shapes; search, comparison and studies have tests of their own."""

import json

import pytest
from commands import run
from tiny import annotation, write_coco


def test_evaluation_of_three_shapes(mixed_shapes, tmp_path):
    run("evaluate.py", *mixed_shapes.options, "--batch-size", 2, "--out", tmp_path / "evaluation.json")
    report = json.loads((tmp_path / "evaluation.json").read_text())
    # The fixture's objects are the detector's own detections.
    assert report["numbers"]["AP"] > 0.1


def test_gates_of_three_shapes(mixed_shapes, tmp_path):
    sizes = ("--split.calib", 3, "--group-size", 4, "--batch-size", 2, "--epochs", 2)
    run("train_gates.py", *mixed_shapes.options, *sizes, "--out", tmp_path)
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert runs["dense"]["numbers"]["AP"] > 0.1 and len(runs) == 3
    assert all(0 < ffn["recall"] <= 1 for one in runs.values() for ffn in one["ffns"].values())


@pytest.mark.parametrize("kind", ["evaluation", "training"])
def test_stage_times_of_three_shapes(mixed_shapes, tmp_path, kind):
    split = "val2017" if kind == "evaluation" else "train2017"
    objects = [annotation(i, i, (2, 2, 12, 9)) for i in range(1, 16)]
    data = write_coco(tmp_path / "coco", [(32, 40), (60, 32), (32, 60)] * 5, objects, split)
    sizes = ("--run", kind, "--images", 15, "--batch-size", 1, "--repeats", 1, "--out", tmp_path / "stages.json")
    run("benchmarks/stage_times.py", "--model", mixed_shapes.model, "--coco", data, *sizes)
    report = json.loads((tmp_path / "stages.json").read_text())
    assert report["run"] > 0 and all(seconds >= 0 for seconds in report["stages"].values())
