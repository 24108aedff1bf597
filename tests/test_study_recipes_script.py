"""scripts/studies/recipes.py, on a few scenes, and what its tables say."""

import json

import jax
import pytest
from commands import refusal, run
from recipe_report import best_table, points_table

from detr_jax.models.ffn import forward, permute

FEW = ("--train-images", 8, "--eval-images", 6, "--epochs", 1, "--allocation-images", 4, "--tuning.epochs", 1)
FEW += ("--batch-size", 2, "--group-size", 4, "--tile-size", 4, "--thresholds", 0.5, "--densities", 0.3)
FEW += ("--tuned-densities", 0.3, "--shares", 0.4)
SEARCH = {"statistics-images": 8, "calibration-images": 4, "latency-images": 4, "batch-size": 2, "repeats": 1}
SEARCH |= {"fixed": 0.3, "experts": 0.2, "experts-per-ffn": 2}
FEW += tuple(part for option, value in SEARCH.items() for part in (f"--search.{option}", value))


def traced_times(weights, trace, ways, repeats):
    """In the place of run times, which would take a compilation each: that every selector runs in its order."""

    def run_ffn(selector, permuted):
        return forward(permuted, trace.inputs, selector(permuted, trace.inputs, trace.tokens))

    for selector, permutation in ways:
        assert len(permutation) == len(weights.w_in)
        if selector is not None:
            jax.eval_shape(run_ffn, selector, permute(weights, permutation))
    return [1.0 if selector is None else 0.3 for selector, _ in ways]


@pytest.mark.slow
def test_every_recipe_is_measured_in_three_ways(mixed_shapes, tmp_path, monkeypatch):
    monkeypatch.setattr("detr_jax.search.search.measure_times", traced_times)
    run("studies/recipes.py", *mixed_shapes.options, *FEW, "--out", tmp_path / "run")
    points = json.loads((tmp_path / "run" / "results.json").read_text())["points"]
    calibrated = {"+ a threshold for each FFN", "+ groups by co-activation", "labels by contribution"}
    calibrated |= {"the paper's recipe", "+ trained through the detector"}
    searched = {"fixed sets", "fixed sets with reconstructed output layers", "narrow experts", "whatever is best"}
    found = {(point["recipe"], point["chosen_by"]) for point in points}
    assert found == {(recipe, None) for recipe in calibrated} | {
        (recipe, unit) for recipe in searched for unit in ("latency", "density")
    }
    for point in points:
        low, high = point["AP_minus_dense_interval"]
        assert 0 < point["density"] <= 1 and point["time"] > 0 and low <= high
    assert (tmp_path / "run" / "recipes.png").stat().st_size > 10_000
    assert best_table(points) in (tmp_path / "run" / "recipes.md").read_text()


def test_the_best_points_are_those_that_lose_little():
    def point(recipe, lost, density, time):
        interval = [-(lost + 1) / 100, (1 - lost) / 100]
        return {"recipe": recipe, "setting": f"{density:g}", "AP_minus_dense": -lost / 100} | {
            "AP_minus_dense_interval": interval,
            "density": density,
            "time": time,
        }

    points = [point("a", 0.1, 0.5, 0.8), point("a", 0.4, 0.3, 0.9), point("a", 0.6, 0.1, 0.1), point("b", 2, 0.2, 0.2)]
    (a, b) = best_table(points).splitlines()[2:]
    assert [cell.strip() for cell in a.strip("|").split("|")] == [
        *("a", "0.300", "-0.40 [-1.40, +0.60]"),
        *("0.80", "-0.10 [-1.10, +0.90]", "1.25"),
    ]
    assert [cell.strip() for cell in b.strip("|").split("|")] == ["b", *["-"] * 5]
    rows = points_table(points).splitlines()[2:]
    assert len(rows) == 4 and rows[0].split("|")[4].strip() == "0.500"  # the densest first


def test_inputs_are_checked_before_the_folder_is_claimed(mixed_shapes, tmp_path, capsys):
    for options, message in (
        (("--model", "mistyped"), "mistyped"),
        (("--coco", "nowhere"), "nowhere"),
        (("--thresholds", 1.5), "--thresholds must be above 0 and at most 1, not 1.5"),
        (("--group-size", 6), "32 hidden neurons cannot be divided into groups of 6"),
    ):
        arguments = (*mixed_shapes.options, *FEW, *options, "--out", tmp_path / "run")
        assert message in refusal(capsys, "studies/recipes.py", *arguments)
    assert not (tmp_path / "run").exists()
