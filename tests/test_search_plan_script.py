"""The search for a plan, on photographs of three shapes: results, the plan, and early refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import refusal, run
from fixtures_coco import varied_detector

import detr_jax
from detr_jax.data.features import backbone_features
from detr_jax.data.registry import open_dataset
from detr_jax.plan import load_plan
from detr_jax.search.search import most_frequent_shape

FEW = ("--statistics-images", 5, "--calibration-images", 4, "--accuracy-images", 3, "--eval-images", 6)
FEW += ("--batch-size", 2, "--latency-images", 4, "--repeats", 1, "--fixed", 0.5, 0.25)
FEW += ("--experts", 0.25, 0.1, "--experts-per-ffn", 2)


@pytest.fixture(scope="module")
def folder(mixed_shapes, tmp_path_factory):
    out = tmp_path_factory.mktemp("search")
    run("search_plan.py", *mixed_shapes.options, "--budget", "density=0.4", *FEW, "--out", out)
    return out


@pytest.mark.slow
def test_the_budget_is_kept_and_every_candidate_is_reported(folder):
    results = json.loads((folder / "results.json").read_text())
    assert set(results["choices"]) == {"any", "fixed sets, reconstructed or not", "fixed sets"}
    assert all(set(curves) == set(results["choices"]) for curves in results["curves"].values())
    assert np.mean([ffn["density"] for ffn in results["ffns"].values()]) <= 0.4
    for name, candidates in results["candidates"].items():
        kinds = [c["kind"] for c in candidates]
        assert kinds == ["dense", *["fixed", "fixed, reconstructed"] * 2, *["experts"] * 2]
        assert candidates[0]["loss"] == 0 and all(c["seconds"] > 0 for c in candidates)
        chosen = results["ffns"][name]
        assert any(c["kind"] == chosen["kind"] and c["density"] == chosen["density"] for c in candidates)
    assert (folder / "search.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_plan_computes_what_was_measured(folder):
    model = varied_detector()
    plan = load_plan(folder / "plan.safetensors", model)
    assert plan.training["budget"] == "density=0.4"
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 32, 40, 3)), jnp.float32)
    permuted, mask = model.with_permutations(plan.permutations), jnp.ones((2, 32, 40), bool)
    dense = jax.jit(type(model).__call__)(permuted, images, mask)
    np.testing.assert_allclose(dense.logits, model(images, mask).logits, atol=1e-3)  # orders change nothing
    sparse = permuted(images, mask, selectors=plan.selectors)
    assert 1e-3 < np.abs(sparse.logits - dense.logits).max() < 20


def test_a_loss_of_ap_is_a_budget(mixed_shapes, tmp_path, monkeypatch):
    def times(weights, trace, ways, repeats):
        return [1.0 if selector is None else 0.5 for selector, _ in ways]

    monkeypatch.setattr("detr_jax.search.search.measure_times", times)  # of so small FFNs nothing is faster than dense
    options = ("--budget", "ap-loss=90", *FEW, "--experts", "--fixed", 0.5)
    run("search_plan.py", *mixed_shapes.options, *options, "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["choices"]["any"]["density"] < 1 and results["choices"]["any"]["time"] < 1


def test_without_a_usable_ap_there_is_none_to_lose(mixed_shapes, tmp_path, capsys):
    for split in ("train2017", "val2017"):
        (tmp_path / "coco/annotations").mkdir(parents=True, exist_ok=True)
        (tmp_path / "coco" / split).symlink_to(mixed_shapes.coco / split)
        content = json.loads((mixed_shapes.coco / f"annotations/instances_{split}.json").read_text())
        path = tmp_path / f"coco/annotations/instances_{split}.json"
        path.write_text(json.dumps(content | {"annotations": []}))
    inputs = ("--model", mixed_shapes.model, "--coco", tmp_path / "coco", "--out", tmp_path / "run", *FEW)
    assert "AP is undefined on these images" in refusal(capsys, "search_plan.py", *inputs, "--budget", "ap-loss=1")


@pytest.mark.slow
def test_a_finished_search_is_kept(folder, mixed_shapes, capsys):
    options = (*mixed_shapes.options, "--budget", "density=0.4", *FEW, "--out", folder)
    error = refusal(capsys, "search_plan.py", *options)
    assert "holds a finished run" in error and "--resume" not in error


@pytest.mark.parametrize("budget", ["density", "density=2", "latency=-1", "speed=3", "ap-loss=x", "density=nan"])
def test_budgets_that_are_none(budget, tmp_path, capsys):
    error = refusal(capsys, "search_plan.py", "--budget", budget, "--out", tmp_path / "run")
    assert f"'{budget}' is no budget" in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "mistyped"), "mistyped"),
        (("--coco", "nowhere"), "nowhere"),
        (("--statistics-images", 0), "--statistics-images must be at least 1, not 0"),
        (("--experts-per-ffn", 0), "--experts-per-ffn must be at least 1, not 0"),
        (("--fixed", 1.5), "densities of candidates must be above 0 and below 1, not 1.5"),
        (("--repeats", 0), "--repeats must be at least 1, not 0"),
    ],
)
def test_inputs_are_checked_before_the_folder_is_claimed(mixed_shapes, tmp_path, capsys, options, message):
    out = tmp_path / "run"
    error = refusal(capsys, "search_plan.py", *mixed_shapes.options, *FEW, *options, "--out", out)
    assert message in error and not out.exists()


def test_what_is_timed_is_of_the_shape_that_most_images_have(mixed_shapes):
    model, dataset = varied_detector(), open_dataset(f"coco:{mixed_shapes.coco}", "val", 10)
    features = list(backbone_features(model, dataset, 3, ""))
    timed = most_frequent_shape(features, 16)
    # 4 of the 10 images have 4 x 5 tokens, in batches of 3 of which the second is filled up with copies.
    assert timed.mask.shape == (6, 32) and timed.valid.all()
    whole = np.concatenate([b.tokens.x[b.valid] for b in features if b.tokens.mask.shape[1] == 32])
    np.testing.assert_array_equal(timed.x, whole)
    assert most_frequent_shape(features, 2).mask.shape == (2, 32)


def test_an_ffn_that_is_never_active_is_named(mixed_shapes, tmp_path, capsys):
    model = varied_detector()
    model.ffns["decoder.0"].b_in[...] -= 1e4
    detr_jax.save(model, tmp_path / "silent.safetensors")
    options = ("--model", tmp_path / "silent.safetensors", "--coco", mixed_shapes.coco, *FEW, "--budget", "density=0.4")
    error = refusal(capsys, "search_plan.py", *options, "--out", tmp_path / "run")
    assert "no neuron of decoder.0 is active on train2017" in error
