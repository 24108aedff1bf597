"""scripts/search_plan.py, on a few scenes: what it writes, that its plan works, and what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import refusal, run

import detr_jax
from detr_jax.plan import load_plan
from detr_jax.search.candidates import DYNAMIC

FEW = ("--statistics-images", 24, "--calibration-images", 16, "--accuracy-images", 8, "--eval-images", 8)
FEW += ("--batch-size", 8, "--latency-images", 4, "--repeats", 1, "--fixed", 0.5, 0.1, "--dynamic", 0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("search")
    run("search_plan.py", "--budget", "density=0.15", *FEW, "--out", out)
    return out


def test_the_budget_is_kept_and_everything_is_told(folder):
    results = json.loads((folder / "results.json").read_text())
    assert set(results["choices"]) == {"any", "fixed sets, reconstructed or not", "fixed sets"}
    assert all(set(curves) == set(results["choices"]) for curves in results["curves"].values())
    assert all(row["density"] <= 0.17 for row in results["choices"].values())
    assert np.mean([ffn["density"] for ffn in results["ffns"].values()]) <= 0.15
    for name, candidates in results["candidates"].items():
        kinds = [c["kind"] for c in candidates]
        assert kinds[:5] == ["dense", *["fixed", "fixed, reconstructed"] * 2]
        # Nothing to decide where so few neurons ever fire.
        assert kinds[5:] in (
            [],
            *([d, f"{d}, reconstructed"] for d in DYNAMIC),
            [*DYNAMIC, *(f"{d}, reconstructed" for d in DYNAMIC)],
        )
        assert candidates[0]["loss"] == 0 and all(c["seconds"] > 0 for c in candidates)
        chosen = results["ffns"][name]
        assert any(c["kind"] == chosen["kind"] and c["density"] == chosen["density"] for c in candidates)
    assert any(c["kind"] in DYNAMIC for of in results["candidates"].values() for c in of)
    assert (folder / "search.png").stat().st_size > 10_000


def test_the_plan_does_what_was_measured(folder):
    model = detr_jax.load("detr-tiny")
    plan = load_plan(folder / "plan.safetensors", model)
    assert plan.training["budget"] == "density=0.15"
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64, 64, 3)), jnp.float32)
    outputs = jax.jit(type(model).__call__)(model.with_permutations(plan.orders), images, jnp.ones((2, 64, 64), bool))
    dense = model(images, jnp.ones((2, 64, 64), bool))
    np.testing.assert_allclose(outputs.logits, dense.logits, atol=1e-3)  # orders change nothing
    sparse = model.with_permutations(plan.orders)(images, jnp.ones((2, 64, 64), bool), selectors=plan.selectors)
    assert 1e-3 < np.abs(sparse.logits - dense.logits).max() < 20


def test_a_finished_search_is_kept(folder, capsys):
    error = refusal(capsys, "search_plan.py", "--budget", "density=0.15", *FEW, "--out", folder)
    assert "holds a finished run" in error


@pytest.mark.parametrize("budget", ["density", "density=2", "latency=-1", "speed=3", "ap-loss=x", "density=nan"])
def test_budgets_that_are_none(budget, tmp_path, capsys):
    error = refusal(capsys, "search_plan.py", "--budget", budget, "--out", tmp_path / "run")
    assert f"'{budget}' is no budget" in error and not (tmp_path / "run").exists()
