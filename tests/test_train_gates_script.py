"""The main command: its results, its refusals, and a kill in the middle of it."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import SCRIPTS, refusal, run
from PIL import Image
from report_checks import opened, read_report, sort_by
from scipy.special import expit
from tiny import annotation, tiny_detector, write_coco
from toy_method import InputSize, LargestInput

import detr_jax
from detr_jax.commands.reports import SAMPLES
from detr_jax.plan import load_plan

NAME = "train_gates.py"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Arguments for a small detector and data set that exist as files."""
    root = tmp_path_factory.mktemp("inputs")
    boxes = [annotation(i, i, (4, 4, 20, 20), category_id=1 + i % 2) for i in range(1, 7)]
    for split in ("train2017", "val2017"):
        write_coco(root, [(32, 40)] * 12, boxes, split)
    detr_jax.save(tiny_detector(), root / "detector.safetensors")
    model = ["--model", str(root / "detector.safetensors"), "--coco", str(root)]
    training = ["--split.calib", "4", "--group-size", "4", "--batch-size", "2", "--epochs", "25"]
    return [*model, *training, "--neuron-order", "own"]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    run(NAME, *inputs, "--per-layer", "--out", out)
    return out


def test_it_writes_a_plan_results_and_a_figure(finished):
    model = tiny_detector()
    plan = load_plan(finished / "plan.safetensors", model)
    results = json.loads((finished / "results.json").read_text())
    assert results["fingerprint"] == detr_jax.fingerprint(model) == plan.fingerprint
    assert list(results["runs"]) == [
        "dense",
        "all gated, threshold 0.5",
        "all gated, recall 0.99",
        "encoder.0 alone, threshold 0.5",
        "decoder.0 alone, threshold 0.5",
    ]
    alone = results["runs"]["encoder.0 alone, threshold 0.5"]["ffns"]
    assert alone["encoder.0"]["group_sparsity"] > 0 and alone["decoder.0"]["group_sparsity"] == 0
    calibrated = results["runs"]["all gated, recall 0.99"]["ffns"]
    assert set(plan.selectors) == set(model.config.ffn_names)
    for name, selector in plan.selectors.items():
        assert calibrated[name]["threshold"] == float(expit(selector.threshold))
    assert list(plan.measured["calibration"]["density"]) == list(plan.selectors)
    assert plan.measured["images"] == 12 and plan.training["calibration"]["recall"] == 0.99
    width, height = Image.open(finished / "gates.png").size
    assert width > 1000 and height > 300


def test_the_report_has_the_tables_the_figure_and_sample_images(finished):
    page = read_report(finished / "report.html")
    titles = page.texts["h2"]
    assert titles[:5] == ["What ran", "Accuracy and sparsity", "Figures", "FFNs", "Sample images"]
    assert len(titles) == 5 + SAMPLES
    runs = json.loads((finished / "results.json").read_text())["runs"]
    assert {*runs, *(f"{run['numbers']['AP']:.3f}" for run in runs.values())} <= set(page.texts["td"])
    # The figure, and of each image detections twice and one layer's map of what is active and what is kept.
    assert len(page.all("src")) == 1 + SAMPLES * 4
    kept = [caption for caption in page.all("alt") if "what is kept, encoder.0" in caption]
    assert len(kept) == SAMPLES


def test_the_report_opens_in_a_browser(finished):
    runs = json.loads((finished / "results.json").read_text())["runs"]
    with opened(finished / "report.html") as browser:
        assert sort_by(browser, "FFNs") == sorted(runs)
        assert sort_by(browser, "FFNs") == sorted(runs, reverse=True)
        *divergences, dense = sort_by(browser, "output divergence")
        assert dense == "-" and divergences == sorted(divergences, key=float)


def test_by_default_it_takes_the_embedded_detector_and_scenes(tmp_path):
    sizes = ["--split.train", "32", "--split.calib", "8", "--split.val", "1", "--epochs", "1"]
    run(NAME, *sizes, "--split.statistics", "16", "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["model"] == "detr-tiny"
    assert results["validation"] == {"data": "scenes-val", "images": 1}
    model = detr_jax.load("detr-tiny")
    plan = load_plan(tmp_path / "plan.safetensors", model)
    assert plan.measured["data"] == "scenes-val"
    assert set(plan.permutations) == set(model.config.ffn_names)


def test_the_papers_recipe_has_one_threshold_and_the_detectors_own_groups(inputs, tmp_path):
    assert inputs[-2:] == ["--neuron-order", "own"]
    run(NAME, *inputs[:-2], "--epochs", "1", "--recipe", "paper", "--out", tmp_path)
    assert list(json.loads((tmp_path / "results.json").read_text())["runs"]) == ["dense", "all gated, threshold 0.5"]
    plan = load_plan(tmp_path / "plan.safetensors", tiny_detector())
    assert not plan.permutations and {float(s.threshold) for s in plan.selectors.values()} == {0.0}


def test_gates_that_are_trained_to_a_budget_are_the_plan(inputs, tmp_path):
    few = ["--epochs", "1", "--tuning.epochs", "2"]
    run(NAME, *inputs, *few, "--density", "0.3", "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["runs"])[1:] == ["all gated, threshold 0.5", "all gated, recall 0.99", "all gated, density 0.3"]
    trained = results["runs"]["all gated, density 0.3"]
    plan = load_plan(tmp_path / "plan.safetensors", tiny_detector())
    assert plan.measured["mean_group_sparsity"] == trained["mean_group_sparsity"] > 0.7
    assert plan.training["calibration"]["budget"] == "density 0.3"
    assert plan.training["tuning"]["epochs"] == 2
    for name, selector in plan.selectors.items():
        assert trained["ffns"][name]["threshold"] == float(expit(selector.threshold))


def test_a_method_from_outside_is_fitted_by_its_name(inputs, tmp_path):
    run(NAME, *inputs, "--method", LargestInput.name, "--out", tmp_path)
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert list(runs) == ["dense", "all by largest-input, recall 0.99"]
    plan = load_plan(tmp_path / "plan.safetensors", tiny_detector())
    assert plan.method == LargestInput.name
    assert all(isinstance(selector.score, InputSize) for selector in plan.selectors.values())
    threshold = runs["all by largest-input, recall 0.99"]["ffns"]["encoder.0"]["threshold"]
    assert threshold == float(plan.selectors["encoder.0"].threshold)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "holds a finished run"),
        (["--resume"], "holds a finished run"),
        (["--resume", "--overwrite"], "choose one"),
        (["--threshold", "1.5"], "--threshold must be between 0 and 1, not 1.5"),
        (["--density", "1.5"], "a density must be above 0 and at most 1, not 1.5"),
        (["--density", "0.1", "--max-divergence", "1"], "different budgets; choose one"),
        (["--recall", "-1"], "--recall must be between 0 and 1, not -1"),
        (["--group-size", "5"], "32 hidden neurons cannot be divided into groups of 5"),
        (["--split.calib", "12"], "too few to hold out 12"),
        (["--keep-tokens", "0"], "shares of tokens are above 0 and at most 1"),
        (["--keep-tokens", "0.5", "0.4", "0.3"], "layers"),
        (["--coco", "nowhere"], "nowhere"),
    ],
)
def test_it_refuses_with_one_line(inputs, finished, capsys, extra, message):
    assert message in refusal(capsys, NAME, *inputs, "--out", finished, *extra)


@pytest.mark.slow
def test_a_killed_run_is_refused_then_resumed_to_the_same_gates(inputs, finished, tmp_path, capsys):
    model, inputs = tiny_detector(), [*inputs, "--checkpoint-steps", "3"]
    command = [sys.executable, str(SCRIPTS / NAME), *inputs, "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not any(path.name.isdigit() for path in (tmp_path / "checkpoints").glob("*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "results.json").exists()

    for extra, message in (([], "pass --resume"), (["--resume", "--epochs", "26"], "with other settings: method")):
        assert message in refusal(capsys, NAME, *inputs, "--out", tmp_path, *extra)
    settings = (tmp_path / "settings.json").read_text()
    (tmp_path / "settings.json").write_text(settings.replace(detr_jax.fingerprint(model), "another"))
    refused = refusal(capsys, NAME, *inputs, "--out", tmp_path, "--resume")
    assert "fingerprint of the detector was another, now" in refused
    (tmp_path / "settings.json").write_text(settings)
    run(NAME, *inputs, "--out", tmp_path, "--resume")
    whole, resumed = (load_plan(out / "plan.safetensors", model).selectors for out in (finished, tmp_path))
    assert set(whole) == set(resumed) == set(model.config.ffn_names)
    for name, selector in whole.items():
        np.testing.assert_array_equal(resumed[name].score.kernel, selector.score.kernel)
        np.testing.assert_array_equal(resumed[name].score.bias, selector.score.bias)
        assert resumed[name].threshold == selector.threshold


def test_photographs_without_annotations_show_the_divergence_of_the_outputs(inputs, tmp_path, capsys):
    model, folder = inputs[:2], Path(inputs[3]) / "train2017"
    sizes = ["--split.calib", "4", "--group-size", "4", "--batch-size", "2", "--epochs", "1", "--neuron-order", "own"]
    run(NAME, *model, "--data", f"images:{folder}", *sizes, "--threshold", "0.9", "--out", tmp_path)
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert all(one["numbers"] is None for one in runs.values())
    assert runs["dense"]["divergence"] is None or runs["dense"]["divergence"] == 0
    assert runs["all gated, threshold 0.9"]["divergence"] > 0
    assert (tmp_path / "gates.png").stat().st_size > 10_000
    assert "What ran" in read_report(tmp_path / "report.html").texts["h2"]
    assert "nan" not in capsys.readouterr().out


def test_experts_have_options_and_a_figure_of_their_own(inputs, tmp_path, capsys):
    options = ["--method", "experts", "--options", "experts=3", "rounds=0", "images=4", "dtype=bfloat16"]
    run(NAME, *inputs, *options, "--density", "0.5", "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["training"]["recipe"]["experts"] == 3
    assert min(Image.open(tmp_path / "experts.png").size) > 300
    assert len(read_report(tmp_path / "report.html").all("src")) == 2 + SAMPLES * 4
    plan = load_plan(tmp_path / "plan.safetensors", tiny_detector())
    assert plan.measured["implementation"] == "grouped by expert"
    assert all(len(selector.widths) == 3 for selector in plan.selectors.values())
    wrong = refusal(capsys, NAME, *inputs, "--method", "experts", "--options", "expert=3", "--out", tmp_path)
    assert "experts has no option 'expert'; it has experts, rounds" in wrong
    wrong = refusal(capsys, NAME, *inputs, "--method", "experts", "--options", "experts=x", "--out", tmp_path)
    assert "'experts=x' is no value of an option of experts" in wrong


def test_token_gates_are_part_of_the_plan(inputs, tmp_path):
    run(NAME, *inputs, "--epochs", "1", "--keep-tokens", "0.5", "--out", tmp_path)
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert list(runs)[-1] == "all gated, recall 0.99, 50 % of the tokens"
    of_ffns = runs["all gated, recall 0.99, 50 % of the tokens"]["ffns"]
    assert 0.4 < of_ffns["encoder.0"]["tokens"] < 0.7 and of_ffns["decoder.0"]["tokens"] == 1
    plan = load_plan(tmp_path / "plan.safetensors", tiny_detector())
    assert plan.selectors["encoder"].keep == (0.5,)
    assert plan.training["token gates"]["images"] == len(list(Path(inputs[3]).glob("train2017/*"))) - 4
    assert "50 % of the tokens" in (tmp_path / "report.html").read_text()
