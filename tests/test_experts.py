"""Narrow experts: the fit, its special cases, their plans, and every way to use them."""

import contextlib
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run
from standalone import FFNInputs, StandaloneFFNs
from tiny import tiny_detector, tiny_ffn

import detr_jax
from detr_jax.calibration.inputs import draw_inputs, drawn_tokens
from detr_jax.calibration.moments import moments_of
from detr_jax.calibration.sensitivity import OutputDivergence
from detr_jax.calibration.token_sensitivity import Sensitivity, draw_sensitivities, sensitivity_of
from detr_jax.errors import InputError
from detr_jax.kernels import Execution, ffn
from detr_jax.methods import Executed, Experts, FitMaterial, RoutedExperts
from detr_jax.methods.expert_fitting import WIDTHS, _Layer, fit_experts
from detr_jax.methods.reconstruction import obs_ranking, reconstruct_output
from detr_jax.models import Selection
from detr_jax.models.ffn import forward, trace
from detr_jax.plan import load_plan, save_plan
from detr_jax.run_folder import PARTS
from detr_jax.training import fit

F, D = 64, 12
WEIGHTS, X, TOKENS = tiny_ffn(F, D, images=40)
INPUTS = np.asarray(X)[np.asarray(TOKENS)]
FEW = Experts(experts=4, rounds=1, router_steps=50)


def selector(method=FEW, density=0.25, inputs=INPUTS, weights=WEIGHTS) -> RoutedExperts:
    (found,) = method.at_densities(FitMaterial(weights, inputs=inputs), lambda density: 0.0, (density,))
    return found


def error(found: RoutedExperts) -> float:
    """Share of the variance of the outputs that is missed."""
    outputs = np.asarray(forward(WEIGHTS, X, found(WEIGHTS, X, TOKENS)))[np.asarray(TOKENS)]
    dense = np.asarray(ffn(X, *WEIGHTS))[np.asarray(TOKENS)]
    return float(((outputs - dense) ** 2).sum() / ((dense - dense.mean(0)) ** 2).sum())


def kept_share(found: RoutedExperts) -> float:
    return float(np.asarray(found(WEIGHTS, X, TOKENS).per_token(TOKENS.shape, F))[np.asarray(TOKENS)].mean())


@pytest.mark.parametrize("ranking", ["energy", "obs"])
def test_more_experts_and_rounds_miss_less_at_the_same_density(ranking):
    method = dataclasses.replace(FEW, ranking=ranking, router_steps=300)
    one, eight, trained = (
        selector(dataclasses.replace(method, experts=experts, rounds=rounds))
        for experts, rounds in ((1, 0), (8, 0), (8, 2))
    )
    assert max(error(trained), error(eight)) < 0.9 * error(one)
    for found in (one, eight, trained):
        assert 0.15 < kept_share(found) <= 0.25 + 1e-6
        assert set(found.widths) <= set(WIDTHS)


def test_one_expert_is_a_fixed_set_with_reconstructed_output():
    found = selector(Experts(experts=1, rounds=0, ranking="obs", ridge=1e-3))
    moments = moments_of(trace(WEIGHTS, X, TOKENS).hidden, TOKENS)
    kept = np.isin(np.arange(F), np.asarray(found.neurons[0][0]))
    # Elimination among the candidates of highest energy, which here are all but few.
    assert len(set(np.flatnonzero(kept)) & set(obs_ranking(WEIGHTS, moments)[:16])) >= 13
    second = reconstruct_output(WEIGHTS, moments, kept)
    hidden = jax.nn.relu(X @ WEIGHTS.w_in.T + WEIGHTS.b_in)
    expected = np.asarray(hidden @ second.w_out + second.b_out)[np.asarray(TOKENS)]
    outputs = np.asarray(forward(WEIGHTS, X, found(WEIGHTS, X, TOKENS)))[np.asarray(TOKENS)]
    np.testing.assert_allclose(outputs, expected, atol=5e-3 * np.abs(expected).max())


def test_equal_widths():
    found = selector(dataclasses.replace(FEW, widths="equal"))
    assert set(found.widths) == {16} and kept_share(found) == pytest.approx(0.25)


@pytest.mark.parametrize("widths", ["equal", "price"])
def test_equal_widths_are_equal_in_all_ffns(widths):
    """The divergence that an FFN's error causes decides about its widths only where these have a price."""
    method = dataclasses.replace(FEW, widths=widths)
    material = {name: FitMaterial(WEIGHTS, inputs=INPUTS, name=name) for name in ("a", "b")}
    parts = []

    def part(name, compute):
        parts.append(name)
        return compute()

    found = method.at_mean_density(material, 0.25, lambda selectors: 1.0 if "a" in selectors else 1e-3, part)
    assert len(parts) == len(set(parts)) == method.parts(2)
    assert (found["a"].widths == found["b"].widths == (16,) * 4) == (widths == "equal")


def test_without_neurons_an_expert_is_the_mean_of_its_tokens():
    found = selector(density=0.0)
    assert set(found.widths) == {0}
    selection = found(WEIGHTS, X, TOKENS)
    outputs, dense = np.asarray(forward(WEIGHTS, X, selection)), np.asarray(ffn(X, *WEIGHTS))
    ids = np.asarray(selection.routed.assignment)
    for expert in range(4):
        mean = dense[ids == expert].mean(0)
        np.testing.assert_allclose(
            outputs[ids == expert], np.broadcast_to(mean, outputs[ids == expert].shape), atol=1e-4
        )
    assert (outputs[~np.asarray(TOKENS)] == 0).all()


def test_with_all_neurons_experts_are_the_ffn():
    found = selector(density=1.0)
    outputs = np.asarray(forward(WEIGHTS, X, found(WEIGHTS, X, TOKENS)))[np.asarray(TOKENS)]
    np.testing.assert_allclose(outputs, np.asarray(ffn(X, *WEIGHTS))[np.asarray(TOKENS)], atol=1e-4)


@pytest.mark.parametrize("inputs", [INPUTS[:3], INPUTS[:1], np.repeat(INPUTS[:1], 50, axis=0)])
def test_more_experts_than_tokens_and_experts_without_tokens(inputs):
    found = selector(dataclasses.replace(FEW, experts=16), inputs=inputs)
    outputs = forward(WEIGHTS, X, found(WEIGHTS, X, TOKENS))
    assert np.isfinite(np.asarray(outputs)).all() and len(found.widths) <= 16


def test_a_fit_is_deterministic_and_depends_on_its_seed():
    one, same = selector(), selector()
    assert jax.tree.structure(one) == jax.tree.structure(same)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)
    other = selector(dataclasses.replace(FEW, seed=1))
    assert one.kernel.shape != other.kernel.shape or not np.array_equal(one.kernel, other.kernel)


def test_a_dearer_error_gets_more_neurons():
    ffns = {name: FitMaterial(WEIGHTS, inputs=INPUTS) for name in ("one", "other")}
    weights = {"one": 1.9, "other": 0.1}
    found = fit_experts(ffns, 0.25, FEW, importance=lambda fitted, missed: weights)
    neurons = {name: sum(map(len, of.neurons)) for name, of in found.items()}
    assert neurons["one"] > 1.5 * neurons["other"]


def test_prepared_experts_compute_the_same_and_out_of_range_is_refused():
    found = selector()
    bare = dataclasses.replace(found, gathered=None)
    for execution in (None, Execution(), Execution(implementation="reference")):
        of = [s if execution is None else Executed(s, execution) for s in (found, bare)]
        one, other = (np.asarray(forward(WEIGHTS, X, s(WEIGHTS, X, TOKENS))) for s in of)
        np.testing.assert_allclose(one, other, atol=1e-5)
    wrong = dataclasses.replace(bare, neurons=tuple(stack + F for stack in bare.neurons))
    with pytest.raises(InputError, match=f"of an FFN with {F}"):
        wrong.prepare(WEIGHTS)


def test_inputs_are_drawn_without_padding_and_evenly():
    batches = [FFNInputs({"f": X[i : i + 8]}, {"f": TOKENS[i : i + 8]}) for i in range(0, 40, 8)]
    drawn = draw_inputs(StandaloneFFNs({"f": WEIGHTS}), batches, 80, 40, seed=0)["f"]
    assert drawn.shape == (80, D) and drawn.dtype == np.float32
    rows = {row.tobytes(): image for image, of in enumerate(np.asarray(X)) for row in of[np.asarray(TOKENS[image])]}
    images = np.array([rows[row.tobytes()] for row in drawn])  # a KeyError would be padding
    assert len({row.tobytes() for row in drawn}) == 80 and np.bincount(images).max() <= 2
    again = draw_inputs(StandaloneFFNs({"f": WEIGHTS}), batches, 80, 40, seed=0)["f"]
    np.testing.assert_array_equal(drawn, again)
    with pytest.raises(InputError, match="no images to draw tokens from"):
        draw_inputs(StandaloneFFNs({"f": WEIGHTS}), [], 80, 40, seed=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ValidInputs(FFNInputs):
    valid: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weighing(StandaloneFFNs):
    """Outputs diverge by what errors of an FFN weigh: at a token (images, tokens) times in a direction (d,)."""

    at: jax.Array
    along: jax.Array

    def transform(self, batch, selectors=None):
        select = (selectors or {}).get("f", lambda *_: Selection())
        return forward(WEIGHTS, batch.x["f"], select(WEIGHTS, batch.x["f"], batch.tokens["f"]))

    def divergence(self, dense, sparse):
        return (self.at[..., None] * self.along * (dense - sparse) ** 2).sum((1, 2))


def test_sensitivities_are_those_of_the_outputs():
    at = np.where(np.random.default_rng(0).random(TOKENS.shape) < 0.5, 1.0, 0.1)
    along = np.linspace(0.5, 3, D)
    model = Weighing({"f": WEIGHTS}, jnp.asarray(at), jnp.asarray(along))
    images = ValidInputs({"f": X}, {"f": TOKENS}, jnp.ones(len(X), bool))
    found = sensitivity_of("f", draw_sensitivities(model, [images], 10**6, len(X), seed=0))
    drawn, exist = map(np.asarray, drawn_tokens(TOKENS, jax.random.fold_in(jax.random.key(0), 0), TOKENS.shape[1]))
    weighs = np.take_along_axis(at, drawn, axis=1)[exist]
    assert found.tokens.shape == (int(TOKENS.sum()),) == weighs.shape
    # Gradients are proportional to the second derivatives, so their squares have those of the weights.
    assert found.tokens[weighs == 1].mean() / found.tokens[weighs < 1].mean() == pytest.approx(100, rel=0.2)
    expected = np.diag(along**2)
    np.testing.assert_allclose(found.metric / np.trace(found.metric), expected / np.trace(expected), atol=0.02)


def test_tokens_and_directions_that_count_more_have_smaller_errors():
    exist, method = np.asarray(TOKENS), dataclasses.replace(FEW, rounds=0)
    dense, ids = np.asarray(ffn(X, *WEIGHTS))[exist], selector(method)(WEIGHTS, X, TOKENS).routed.assignment[exist]
    important = np.asarray(ids) == np.bincount(ids).argmax()

    def missed(sensitivity) -> np.ndarray:
        material = FitMaterial(WEIGHTS, inputs=INPUTS, sensitivity=sensitivity)
        (found,) = method.at_densities(material, lambda density: 0.0, (0.2,))
        return (np.asarray(forward(WEIGHTS, X, found(WEIGHTS, X, TOKENS)))[exist] - dense) ** 2

    alike, direction = np.ones(len(dense)), np.diag(np.where(np.arange(D) < 2, 1.0, 1e-3))
    by_default, by_token = missed(None), missed(Sensitivity(np.where(important, 1.0, 0.01), np.eye(D)))
    assert by_token[important].sum() < 0.9 * by_default[important].sum()
    assert missed(Sensitivity(alike, direction))[:, :2].sum() < 0.9 * by_default[:, :2].sum()
    np.testing.assert_allclose(missed(Sensitivity(0 * alike, 0 * direction)), by_default, rtol=0.1, atol=1e-3)


def test_features_of_the_images_to_fit_on_are_not_kept(monkeypatch):
    kept, embed = [], fit.Fit._embedded
    monkeypatch.setattr(fit.Fit, "_embedded", lambda self, data, use: kept.append(use) or embed(self, data, use))
    data = detr_jax.open_dataset("scenes", "train", 12)
    method = Experts(experts=1, rounds=0, images=4)
    detr_jax.sparsify(tiny_detector(), data, method, detr_jax.Density(0.3), calibration=4, progress=False)
    assert kept == ["calibration"]


@pytest.fixture(scope="module")
def sparse():
    method = Experts(experts=3, rounds=1, router_steps=20, images=4, dtype="bfloat16")
    data = detr_jax.open_dataset("scenes", "train", 12)
    return detr_jax.sparsify(tiny_detector(), data, method, detr_jax.Density(0.3), calibration=4, progress=False)


def test_an_interrupted_fit_goes_on_where_it_stopped_to_the_same_experts(tmp_path, monkeypatch):
    method = Experts(experts=3, rounds=1, router_steps=20, images=4, ranking="obs")
    data, budget = detr_jax.open_dataset("scenes", "train", 12), detr_jax.Density(0.3)
    left, computed = math.inf, []

    def watch(owner, name):
        step = getattr(owner, name)

        def watched(*arguments, **options):
            if len(computed) >= left:
                raise KeyboardInterrupt
            computed.append(name)
            return step(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(fit, "draw_inputs")
    watch(fit, "draw_sensitivities")
    watch(OutputDivergence, "__call__")
    for name in ("start", "ranked_by_elimination", "reconstructed", "trained"):
        watch(_Layer, name)

    def run(folder, resume):
        options = {"calibration": 4, "folder": tmp_path / folder, "resume": resume, "progress": False}
        return detr_jax.sparsify(tiny_detector(), data, method, budget, **options).plan.selectors

    whole, every = run("whole", False), computed.copy()
    assert every.count("trained") == 2 and every.count("reconstructed") == 6
    computed.clear()
    for left in [*range(2, len(every), 4), math.inf]:  # each goes on where the one before was interrupted
        with contextlib.nullcontext() if left == math.inf else pytest.raises(KeyboardInterrupt):
            resumed = run("interrupted", (tmp_path / "interrupted").exists())
        assert (tmp_path / "interrupted" / PARTS).exists() == (left < math.inf)  # only an unfinished fit needs them
    assert computed == every  # none of the interruptions is between divergences, which are one part
    assert jax.tree.structure(resumed) == jax.tree.structure(whole)
    for one, other in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_a_plan_file_keeps_neurons_and_output_rows_alone(sparse, tmp_path):
    path = tmp_path / "plan.safetensors"
    save_plan(sparse.plan, path)
    of = sparse.plan.selectors["encoder.0"]
    rows = sum(stack.size for stack in of.w_out)
    assert {stack.dtype for stack in of.w_out} == {jnp.dtype("bfloat16")}
    assert path.stat().st_size < len(sparse.plan.selectors) * (2.5 * rows + 40_000)
    loaded = detr_jax.load_sparse(sparse.dense, path)
    assert loaded.plan.selectors["encoder.0"].gathered is not None
    images = jnp.asarray(np.random.default_rng(0).random((1, 32, 40, 3)), jnp.float32)
    np.testing.assert_array_equal(loaded(images).logits, sparse(images).logits)
    assert load_plan(path, sparse.dense).selectors["encoder.0"].gathered is None


def test_a_plan_says_what_runs_and_how_much(sparse):
    images = jnp.asarray(np.random.default_rng(0).random((2, 32, 40, 3)), jnp.float32)
    widest = max(sparse.plan.selectors["encoder.0"].widths)
    activity = sparse.inspect(images)["encoder.0"]
    assert activity.execution.implementation == "xla" and activity.execution.neurons == widest
    assert activity.density <= activity.executed  # whole tiles of tokens
    assert "execution: grouped by expert" in repr(sparse)
    reference = sparse.with_implementation("reference")
    np.testing.assert_allclose(reference(images).logits, sparse(images).logits, atol=1e-4)
    assert reference.inspect(images)["encoder.0"].execution.implementation == "reference"


def test_bad_options_are_named():
    for wrong in ({"experts": 0}, {"rounds": -1}, {"ridge": -1.0}, {"tokens": 0}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} must be at least"):
            Experts(**wrong)
    with pytest.raises(InputError, match="ranking must be one of energy, obs, not 'size'"):
        Experts(ranking="size")
    with pytest.raises(InputError, match=r"experts has no threshold: its budget is a Density"):
        detr_jax.sparsify(tiny_detector(), detr_jax.open_dataset("scenes", "train", 8), "experts", detr_jax.Recall())


def test_the_whole_detector_is_timed_beside_the_dense_one(sparse, tmp_path):
    detr_jax.save(sparse.dense, tmp_path / "detector.safetensors")
    save_plan(sparse.plan, tmp_path / "plan.safetensors")
    options = ["--model", tmp_path / "detector.safetensors", "--plans", tmp_path / "plan.safetensors"]
    run("benchmarks/end_to_end.py", *options, "--images", 2, "--repeats", 1, "--out", tmp_path / "times.json")
    results = json.loads((tmp_path / "times.json").read_text())
    (row,) = results["rows"]
    assert set(row["share_of_dense"]) == {"FFNs", "transformer", "detector"} and results["images"] == 2
    assert row["density"] <= row["executed"] and "xla" in next(iter(results["executions"].values()))
