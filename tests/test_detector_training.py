import dataclasses
import json
import runpy
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from test_architectures import CONFIGS
from tiny import TINY_CONFIG, tiny_detector
from tiny import outputs as compiled_outputs

import detr_jax
from detr_jax.data import scenes
from detr_jax.data.dataset import Example
from detr_jax.data.scenes import SIDE, max_objects, render_scene
from detr_jax.models import Preprocessing
from detr_jax.models.labels import SCENES_LABELS
from detr_jax.models.parameters import named_parameters
from detr_jax.training.detector.train import (
    DetectorTraining,
    hoyer_weight,
    take_step,
    targets_of,
    train_detector,
    training_batches,
    untrained,
)

SCRIPT = Path(__file__).parent.parent / "scripts/train_detector.py"
CONFIG = dataclasses.replace(TINY_CONFIG, labels=SCENES_LABELS, preprocessing=Preprocessing(SIDE, 2 * SIDE))
TRAINING = DetectorTraining(steps=4, batch_size=2, warmup_steps=1, checkpoint_steps=2)
DEFORMABLE = dataclasses.replace(
    CONFIGS["deformable"], labels=SCENES_LABELS, queries=8, two_stage=False, preprocessing=CONFIG.preprocessing
)
"""With the backbone of `CONFIG`."""


class Killed(Exception):
    pass


def arrays(model):
    return {name: np.asarray(array) for name, array in named_parameters(model).items()}


def wait_for(path):
    """Checkpoints are written in the background."""
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise TimeoutError(path)


@pytest.mark.slow
def test_a_killed_training_goes_on_bit_identically(tmp_path):
    losses = {}

    def record(step, parts):
        losses[step] = {name: float(value) for name, value in parts.items()}

    before = take_step._cache_size()
    whole = arrays(train_detector(CONFIG, TRAINING, tmp_path / "whole", record))
    compiled = take_step._cache_size()
    assert compiled == before + 1, "all steps are one program"
    assert list(losses) == [0, 1, 2, 3]
    assert all(np.isfinite(value) for parts in losses.values() for value in parts.values())
    assert set(losses[0]) == {"detection", "dense", "hoyer"}

    def kill(step, parts):
        if step == 2:
            wait_for(tmp_path / "killed" / "2")
            raise Killed

    with pytest.raises(Killed):
        train_detector(CONFIG, TRAINING, tmp_path / "killed", kill)
    resumed = {}
    model = train_detector(CONFIG, TRAINING, tmp_path / "killed", lambda step, parts: resumed.update({step: parts}))
    assert list(resumed) == [2, 3] and take_step._cache_size() == compiled, "a second training compiles nothing"
    assert {name: float(value) for name, value in resumed[3].items()} == losses[3]
    for name, array in arrays(model).items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)

    again = []
    finished = train_detector(CONFIG, TRAINING, tmp_path / "killed", lambda step, parts: again.append(step))
    assert not again
    for name, array in arrays(finished).items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)


@pytest.mark.slow
def test_a_deformable_detector_begins_with_another_ones_backbone(tmp_path):
    backbone = tiny_detector(config=CONFIG).backbone
    training = dataclasses.replace(TRAINING, steps=3, last_steps=1, last_batch_size=1, backbone="detr-tiny")
    losses = []
    model = train_detector(DEFORMABLE, training, tmp_path, lambda step, parts: losses.append(parts), backbone)
    assert len(losses) == 3 and all(np.isfinite(value) for parts in losses for value in parts.values())
    before, after = (
        {name: np.asarray(value) for name, value in named_parameters(each).items()}
        for each in (backbone, model.backbone)
    )
    frozen = {name for name, array in before.items() if np.array_equal(array, after[name])}
    assert frozen == {name for name in before if name.startswith(("stem", "stages.0")) or ".norm." in name}
    first = arrays(untrained(DEFORMABLE, training, backbone)[0])
    same = {name for name, array in arrays(model).items() if np.array_equal(array, first[name])}
    assert {name.removeprefix("backbone.") for name in same} == frozen, "everything else is trained"


def test_a_new_deformable_detector_finds_classes_rare_and_boxes_small():
    model, heads = untrained(DEFORMABLE, TRAINING, tiny_detector(config=CONFIG).backbone)
    assert len(heads) == 2
    outputs = compiled_outputs(model, np.zeros((1, 64, 64, 3), np.float32), auxiliary=True)
    for logits, boxes in (*outputs.auxiliary, (outputs.logits, outputs.boxes)):
        assert jax.nn.sigmoid(logits).mean() < 0.05
        np.testing.assert_allclose(boxes[..., 2:], jax.nn.sigmoid(-2.0), rtol=1e-5)
    assert [tokens.shape for tokens in outputs.encoder] == [(1, 16**2 + 8**2 + 4**2, DEFORMABLE.d_model)] * 2


def test_the_last_batches_are_large_scenes():
    training = dataclasses.replace(TRAINING, steps=3, last_steps=1, last_batch_size=1)
    assert [training.images(steps) for steps in range(4)] == [0, 2, 4, 5]
    *small, (images, targets) = training_batches(training, 0)
    assert [len(images) for images, _ in small] == [2, 2] and images.shape == (1, 256, 256, 3)
    scene = render_scene("train", 0, 256)
    np.testing.assert_array_equal(images[0], scene.image)
    assert targets.labels.shape == (1, max_objects(256)) and targets.valid.sum() == len(scene.labels)
    low = (targets.boxes[0, : len(scene.labels), :2] - targets.boxes[0, : len(scene.labels), 2:] / 2) * 256
    np.testing.assert_allclose(low, scene.boxes[:, :2], atol=1e-3)


def test_batches_hold_the_scenes_from_any_step_on():
    (images, targets), *others = training_batches(TRAINING, 2)
    assert len(others) == 1
    assert images.shape == (2, SIDE, SIDE, 3)
    for i in range(2):
        scene = render_scene("train", 4 + i)
        count = len(scene.labels)
        np.testing.assert_array_equal(images[i], scene.image)
        np.testing.assert_array_equal(targets.labels[i, :count], scene.labels)
        assert targets.valid[i].sum() == count
        centre, size = targets.boxes[i, :count, :2] * SIDE, targets.boxes[i, :count, 2:] * SIDE
        np.testing.assert_allclose(np.hstack([centre - size / 2, centre + size / 2]), scene.boxes, atol=1e-4)


def test_targets_of_an_image_without_objects():
    empty = Example(0, np.zeros((SIDE, SIDE, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int32))
    assert not targets_of([empty]).valid.any()


def test_penalty_ramps_up():
    training = DetectorTraining(steps=100, warmup_steps=10, hoyer_weight=10, hoyer_start=0.4, hoyer_full=0.5)
    weights = [float(hoyer_weight(training, step)) for step in (0, 40, 45, 50, 99)]
    assert weights == pytest.approx([0, 0, 5, 10, 10], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"last_steps": 5}, "last_steps must be from 0 to steps 4, not 5"),
        ({"checkpoint_steps": 0}, "checkpoint_steps must be at least 1, not 0"),
        ({"warmup_steps": 4}, "warmup_steps must be from 0 to below steps 4, not 4"),
        ({"hoyer_full": 0.4}, r"hoyer_start 0\.4 must be below hoyer_full 0\.4"),
    ],
)
def test_impossible_recipes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TRAINING, **change)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Runs the script for a tiny detector and 8 validation scenes; returns its exit status."""
    monkeypatch.setattr(detr_jax, "preset_config", lambda name: CONFIG)
    monkeypatch.setitem(scenes.IMAGES, "val", 8)

    def run(*options):
        settings = ("--steps", 4, "--batch-size", 2, "--warmup-steps", 1, "--checkpoint-steps", 2)
        monkeypatch.setattr(
            sys, "argv", ["train_detector.py", *map(str, (*settings, "--out", tmp_path / "run", *options))]
        )
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            return stop.code
        return 0

    return run


def test_train_measure_and_resume(train, tmp_path, capsys):
    out = tmp_path / "run"
    assert train("--resume") == 2
    assert "there is no run in" in capsys.readouterr().err

    assert train() == 0
    report = json.loads((out / "detr-tiny.json").read_text())
    assert len(report["numbers"]) == 12
    assert report["images"] == 8
    assert set(report["zeros"]) == set(CONFIG.ffn_names)
    assert all(0 < share < 1 for share in report["zeros"].values())
    assert report["recipe"]["steps"] == report["log"]["last"]["step"] == 4
    assert report["training_command"].endswith("--steps 4 --batch-size 2 --warmup-steps 1 --checkpoint-steps 2")
    assert report["fingerprint"] == detr_jax.fingerprint(detr_jax.load(out / "detr-tiny.safetensors"))
    card = (out / "detr-tiny.md").read_text()
    assert report["training_command"] in card
    assert "2510.09380" in card
    assert (out / "training.png").stat().st_size > 0
    log = (out / "log.jsonl").read_text()

    capsys.readouterr()
    assert train() == 2
    assert "--overwrite" in capsys.readouterr().err
    assert train("--resume", "--overwrite", "--seed", "1") == 2
    assert "seed was 0, now 1" in capsys.readouterr().err
    assert train("--resume") == 2
    assert "--overwrite" in capsys.readouterr().err

    assert train("--resume", "--overwrite") == 0
    assert (out / "log.jsonl").read_text() == log
    again = json.loads((out / "detr-tiny.json").read_text())
    assert {key: again[key] for key in ("numbers", "zeros", "fingerprint", "log")} == {
        key: report[key] for key in ("numbers", "zeros", "fingerprint", "log")
    }
