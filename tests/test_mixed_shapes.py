"""Commands on photographs of three padded shapes; search, comparison and studies have tests of their own."""

import json

from commands import run


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
