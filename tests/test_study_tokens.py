"""The study of token gates: its files, with a plan, and what it refuses."""

import json

import pytest
from commands import refusal, run

pytestmark = pytest.mark.slow

SCRIPT = "studies/tokens.py"
OPTIONS = ("--images", 4, "--train", 4, "--epochs", 1, "--batch-size", 2, "--timed", 1, "--repeats", 1)


def test_rows_and_times_with_a_plan(tmp_path):
    rows = ("--rows", "linear", "focus-detr", "lite-detr", "--keep", 0.5)
    run(SCRIPT, *OPTIONS, *rows, "--plan", "detr-tiny", "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    found = {row["row"]: row for row in results["rows"]}
    assert list(found) == ["linear", "focus-detr", "lite-detr", "plan", "plan and linear"]
    assert all(-1 <= row["AP_minus_dense"] <= 1 for row in found.values())
    assert found["plan"]["density"] < 0.2
    assert set(results["seconds"]["1"]) == {"dense", "linear, 0.5", "plan", "plan and linear, 0.5"}
    text = (tmp_path / "tables.md").read_text()
    assert "second attention" in text and "batch 1" in text
    assert (tmp_path / "tokens.png").stat().st_size > 0


def test_what_it_refuses(tmp_path, capsys):
    assert "--keep must be above 0 and at most 1, not 1.5" in refusal(capsys, SCRIPT, "--keep", 1.5, "--out", tmp_path)
    assert "--rows are some of sparse-detr" in refusal(capsys, SCRIPT, "--rows", "dino", "--out", tmp_path)
