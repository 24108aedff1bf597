"""The comparison as a command: its results, its refusals, and going on after an interruption."""

import json

import numpy as np
import pytest
from commands import refusal, run
from fixtures_coco import varied_detector
from PIL import Image
from toy_method import LargestInput

import detr_jax
from detr_jax.plan import load_plan

METHODS = ["static-contribution", "mgs", "core", "rsparse", LargestInput.name]
"""The last one registers itself from outside the package."""
SCRIPT = "compare_selectors.py"


@pytest.fixture(scope="module")
def inputs(mixed_shapes):
    sizes = ["--calibration-images", "4", "--allocation-images", "4", "--eval-images", "8", "--eval-batch-size", "4"]
    training = ["--group-size", "4", "--batch-size", "2", "--epochs", "2", "--tuning-epochs", "1"]
    chosen = [
        "--methods",
        *METHODS,
        "--densities",
        "0.5",
        "--mgs-density",
        "0.5",
        "--sibs-taus",
        "0.9",
        "--sibs-indicators",
        "4",
    ]
    return [*mixed_shapes.options, *sizes, *training, *chosen]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    run(SCRIPT, *inputs, "--out", out)
    return out


def test_it_measures_every_selector(finished):
    results = json.loads((finished / "results.json").read_text())
    rows = results["rows"]
    assert [row["selector"] for row in rows if row["section"] == "methods"] == METHODS
    assert {row["section"] for row in rows} == {"dense", "bounds", "mgs", "layers", "sibs", "methods"}
    for row in rows[1:]:
        assert {"needs", "granularity", "saves", "dynamic", "trained", "order", "group_size"} <= set(row)
        low, high = row["AP_minus_dense_interval"]
        assert low <= high and 0 < row["flops_share"]["detector"] < 2
    static = next(row for row in rows if row["selector"] == METHODS[0])
    assert static["density"] == pytest.approx(0.5, abs=0.15) and not static["dynamic"]
    assert results["fingerprint"] == detr_jax.fingerprint(varied_detector())
    text = (finished / "comparison.md").read_text()
    assert all(f"| {name} " in text for name in METHODS) and "2510.09380" in text
    for name in ("accuracy", "sizes", "tile_density", "activations", "layers"):
        assert min(Image.open(finished / f"{name}.png").size) > 300


def test_it_keeps_the_best_gates_as_a_plan(finished):
    model = varied_detector()
    plan = load_plan(finished / "plan.safetensors", model)
    assert set(plan.selectors) == set(plan.permutations) == set(model.config.ffn_names)
    assert "trained with the others on" in plan.measured["setting"]


def test_interrupted_it_continues_where_it_was(inputs, finished, tmp_path, monkeypatch):
    from detr_jax.evaluation.comparison import Comparison

    row, seen = Comparison.row, []

    def interrupted(self, config, selectors, measured):
        seen.append(selectors)
        if len(seen) == 12:
            raise OSError("interrupted")
        return row(self, config, selectors, measured)

    monkeypatch.setattr(Comparison, "row", interrupted)
    with pytest.raises(SystemExit):
        run(SCRIPT, *inputs, "--out", tmp_path)
    assert len(json.loads((tmp_path / "progress.json").read_text())) == 11
    run(SCRIPT, *inputs, "--out", tmp_path, "--resume")
    whole, resumed = (json.loads((out / "results.json").read_text())["rows"] for out in (finished, tmp_path))
    assert len(seen) == 1 + len(whole)
    for one, other in zip(whole, resumed, strict=True):
        assert one["setting"] == other["setting"]
        np.testing.assert_allclose(one["numbers"]["AP"], other["numbers"]["AP"], atol=1e-9)
        assert one["ffns"] == other["ffns"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "holds a finished run"),
        (["--methods", "mgs", "magic"], "there are no selectors ['magic']; there are random"),
        (["--densities", "1.5"], "densities must be from 0.01 to below 1, not 1.5"),
        (["--allocation-images", "5"], "from 1 to --calibration-images 4, not 5"),
        (["--calibration-images", "12"], "too few to hold out 12"),
        (["--group-size", "5"], "32 hidden neurons cannot be divided into groups of 5"),
    ],
)
def test_it_refuses_with_one_line(inputs, finished, capsys, extra, message):
    assert message in refusal(capsys, SCRIPT, *inputs, "--out", finished, *extra)
