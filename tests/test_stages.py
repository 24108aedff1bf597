"""The command that says where time goes."""

import json

import pytest
from commands import refusal, run
from profile_stages import StageTimes, stage_table
from tiny import annotation, tiny_detector, write_coco

import detr_jax

NAME = "benchmarks/stage_times.py"
FORWARD = ["decoding", "transfer", "backbone", "transformer without FFNs", "FFNs"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    for split in ("train2017", "val2017"):
        write_coco(root, [(32, 40)] * 12, [annotation(1, 1, (4, 4, 20, 20))], split)
    detr_jax.save(tiny_detector(), root / "detector.safetensors")
    model = ["--model", root / "detector.safetensors", "--coco", root]
    return [*model, "--images", 12, "--batch-size", 2, "--repeats", 3]


@pytest.mark.parametrize(
    ("of", "last"), [("evaluation", ["post-processing", "scoring"]), ("training", ["gates"])], ids=["eval", "training"]
)
def test_it_times_every_stage_and_the_run(inputs, tmp_path, capsys, of, last):
    run(NAME, *inputs, "--run", of, "--trace", tmp_path / "trace", "--out", tmp_path / "times.json")
    times = json.loads((tmp_path / "times.json").read_text())
    assert list(times["stages"]) == FORWARD + last and times["shape"] == [2, 32, 40]
    assert times["run"] > 0 and min(times["stages"].values()) >= 0 < times["stages"]["backbone"]
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    assert "images of 40x32" in (shown := capsys.readouterr().out) and "the run" in shown


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--images", "8"], "8 images make 4 batches of the shape (2, 32, 40), and timing takes 5; use more images"),
        (["--run", "training", "--plan", "plan.safetensors"], "--plan is for --run evaluation"),
    ],
)
def test_it_refuses_with_one_line(inputs, tmp_path, capsys, extra, message):
    assert message in refusal(capsys, NAME, *inputs, *extra, "--out", tmp_path / "times.json")


def test_the_device_waits_for_what_it_has_not_done_itself():
    stages = {"decoding": 0.5, "transfer": 0.01, "backbone": 0.02, "scoring": 0.1}
    times = StageTimes((8, 32, 32), stages, 0.05)
    assert times.busy == pytest.approx(0.03) and times.waiting == pytest.approx(0.02)
    lines = {line.split("  ")[0]: line for line in stage_table(times).splitlines()}
    assert lines["waiting"].endswith("40 %") and lines["transfer"].split()[-4:] == ["device", "10.00", "20", "%"]
    assert StageTimes((8, 32, 32), stages, 0.02).waiting == 0
