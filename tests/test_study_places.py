"""The study of places: its files, with a plan and without, and what it refuses."""

import json

import pytest
from commands import refusal, run

pytestmark = pytest.mark.slow

SCRIPT = "studies/places.py"
OPTIONS = ("--model", "detr-tiny", "--data", "scenes", "--images", "4", "--batch-size", "2")


def test_shares_with_a_plan(tmp_path):
    run(SCRIPT, *OPTIONS, "--plan", "detr-tiny", "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["images"] == 4 and results["data"] == "scenes-val"
    for name in ("encoder.0", "decoder.0"):
        fire, computed = results["fire"][name], results["computed"][name]
        assert fire.keys() == computed.keys()
        for place, density in fire.items():
            assert 0 < density["fired"] < 1 == density["computed"]
            assert density["tokens"] == computed[place]["tokens"] > 0
            assert 0 < computed[place]["computed"] < 1
    text = (tmp_path / "tables.md").read_text()
    assert "stride 16, object" in text and "unmatched" in text and "computed" in text
    assert (tmp_path / "places.png").stat().st_size > 0


def test_what_it_refuses(tmp_path, capsys, mixed_shapes):
    assert "at least 1, not 0" in refusal(capsys, SCRIPT, "--images", "0", "--out", tmp_path)
    photographs = ("--data", f"images:{mixed_shapes.coco / 'val2017'}")
    message = refusal(capsys, SCRIPT, "--model", "detr-tiny", *photographs, "--images", "2", "--out", tmp_path)
    assert "no annotations, which say where objects are" in message
    (tmp_path / "results.json").write_text("{}")
    assert "--overwrite" in refusal(capsys, SCRIPT, *OPTIONS, "--out", tmp_path)
