import dataclasses
import json
import runpy
import sys
from pathlib import Path

import jax
import pytest
from tiny import TINY_CONFIG

import detr_jax
from detr_jax.data import scenes
from detr_jax.labels import SCENES_LABELS
from detr_jax.training.log import TrainingLog, plot_log, read_log

SCRIPT = Path(__file__).parent.parent / "scripts/train_detector.py"
CONFIG = dataclasses.replace(TINY_CONFIG, labels=SCENES_LABELS, shortest_side=128, longest_side=256)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Runs the script for a tiny detector and 8 validation scenes; returns its exit status."""
    monkeypatch.setattr(detr_jax, "preset_config", lambda name: CONFIG)
    monkeypatch.setattr(scenes, "VALIDATION_IMAGES", 8)

    def run(*options):
        fixed = ("--steps", 3, "--batch-size", 2, "--warmup-steps", 1, "--out", tmp_path / "run")
        monkeypatch.setattr(sys, "argv", ["train_detector.py", *map(str, (*fixed, *options))])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            return stop.code
        return 0

    return run


def test_train_measure_and_resume(train, tmp_path, capsys):
    out = tmp_path / "run"
    assert train("--resume") == 2
    assert "holds no training" in capsys.readouterr().err

    assert train() == 0
    report = json.loads((out / "detr-tiny.json").read_text())
    assert len(report["numbers"]) == 12
    assert report["images"] == 8
    assert set(report["zeros"]) == set(CONFIG.ffn_names)
    assert all(0 < share < 1 for share in report["zeros"].values())
    assert report["recipe"]["steps"] == report["log"]["last"]["step"] == 3
    assert report["training_command"].endswith("--steps 3 --batch-size 2 --warmup-steps 1")
    assert report["fingerprint"] == detr_jax.fingerprint(detr_jax.load(out / "detr-tiny.safetensors"))
    card = (out / "detr-tiny.md").read_text()
    assert report["training_command"] in card
    assert "2510.09380" in card
    assert (out / "training.png").stat().st_size > 0
    log = (out / "log.jsonl").read_text()

    capsys.readouterr()
    assert train() == 2
    assert "--resume" in capsys.readouterr().err
    assert train("--resume", "--seed", "1") == 2
    assert "seed 0, not 1" in capsys.readouterr().err
    assert train("--resume") == 2
    assert "--overwrite" in capsys.readouterr().err

    assert train("--resume", "--overwrite") == 0
    assert (out / "log.jsonl").read_text() == log
    again = json.loads((out / "detr-tiny.json").read_text())
    assert {key: again[key] for key in ("numbers", "zeros", "fingerprint", "log")} == {
        key: report[key] for key in ("numbers", "zeros", "fingerprint", "log")
    }


def test_log_goes_on_where_the_checkpoint_was(tmp_path):
    path = tmp_path / "log.jsonl"
    log = TrainingLog(path, steps=10, interval=2)
    written = [log.record(step, {"detection": step, "dense": jax.numpy.float32(1)}) for step in range(7)]
    assert [entry and entry["detection"] for entry in written] == [None, 0.5, None, 2.5, None, 4.5, None]
    with path.open("a") as file:
        file.write('{"step": 8, "det')  # killed while writing

    resumed = TrainingLog(path, steps=9, interval=2)
    for step in range(4, 9):
        resumed.record(step, {"detection": 100, "dense": 1})
    entries = read_log(path)
    assert [(entry["step"], entry["detection"]) for entry in entries] == [
        (2, 0.5),
        (4, 2.5),
        (6, 100),
        (8, 100),
        (9, 100),
    ]
    minutes = [entry["minutes"] for entry in entries]
    assert minutes == sorted(minutes)


def test_figure_of_an_empty_log(tmp_path):
    assert read_log(tmp_path / "log.jsonl") == []
    plot_log([], tmp_path / "training.png")
    assert [file.name for file in tmp_path.iterdir()] == ["training.png"]
