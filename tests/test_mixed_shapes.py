"""Commands on photographs of three padded shapes; search, comparison and studies have tests of their own."""

import json

from commands import run


def test_evaluation_of_three_shapes(mixed_shapes, tmp_path):
    run("evaluate.py", *mixed_shapes.options, "--batch-size", 2, "--out", tmp_path / "evaluation.json")
    report = json.loads((tmp_path / "evaluation.json").read_text())
    # The fixture's objects are the detector's own detections.
    assert report["numbers"]["AP"] > 0.1
