"""The study of seeds: its files, resumed and refused."""

import json

import pytest
from commands import refusal, run

import detr_jax

pytestmark = pytest.mark.slow

SCRIPT = "studies/seeds.py"
OPTIONS = ("--rows", "mgs-0.99", "--seeds", "0", "1", "--train", "16", "--statistics", "8")
OPTIONS += ("--calib", "8", "--images", "4")


def test_rows_and_plans(tmp_path):
    run(SCRIPT, *OPTIONS, "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["images"] == 4 and results["data"] == "scenes-test"
    rows = results["rows"]
    assert rows.keys() == {"mgs-0.99-seed0", "mgs-0.99-seed1"}
    for key, row in rows.items():
        assert 0 < row["density"] < 1 and -1 < row["AP_minus_dense"] < 0.5
        plan = detr_jax.load_sparse("detr-tiny", tmp_path / "plans" / f"{key}.safetensors").plan
        assert plan.method == "mgs" and plan.training["recipe"]["seed"] == row["seed"]
    assert rows["mgs-0.99-seed0"]["density"] != rows["mgs-0.99-seed1"]["density"]
    assert "seed 1" in (tmp_path / "table.md").read_text()


def test_what_it_refuses(tmp_path, capsys):
    assert "--rows are some of mgs-paper" in refusal(capsys, SCRIPT, "--rows", "mgs", "--out", tmp_path)
    assert "at least 1, not 0" in refusal(capsys, SCRIPT, "--images", "0", "--out", tmp_path)
