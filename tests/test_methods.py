"""Every registered method, on an FFN given as arrays; and a toy one that registers itself from outside."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods_table import methods_table
from standalone import FFNInputs, StandaloneFFNs
from tiny import tiny_detector, tiny_ffn
from toy_method import InputSize, LargestInput

from detr_jax.calibration.activations import measure
from detr_jax.calibration.moments import moments_of
from detr_jax.calibration.thresholds import density_threshold, recall_threshold, score_histogram, selectors_at_densities
from detr_jax.calibration.token_sensitivity import Sensitivity
from detr_jax.data.batches import CachedBatches
from detr_jax.errors import InputError
from detr_jax.methods import METHODS, FitMaterial, Thresholded, TrainedMethod, named
from detr_jax.methods.base import STORABLE
from detr_jax.models.ffn import forward, trace
from detr_jax.models.parameters import fingerprint
from detr_jax.plan import Plan, load_plan, save_plan
from detr_jax.training.gates import GateTraining

SIZE = 4
OPTIONS = GateTraining(group_size=SIZE)
DENSITIES = (1.0, 0.5, 0.25, 0.125)
WEIGHTS, X, TOKENS = tiny_ffn(features=64, d_model=24)
TUNED = [name for name, method in METHODS.items() if method.tuned_by != "nothing"]


def small(name):
    """A method with options that suit so small an FFN."""
    own = {"experts": {"experts": 2, "router_steps": 20}}
    return dataclasses.replace(OPTIONS.method(METHODS[name]), **own.get(name, {}))


def material_for(method, weights=WEIGHTS) -> FitMaterial:
    """Material with what the method requires and nothing else."""
    what = trace(weights, X, TOKENS)
    statistics = measure(what, jnp.zeros(TOKENS.shape, int), kinds_count=1)
    parts = {
        "activations": jax.tree.map(np.asarray, statistics),
        "input_moments": moments_of(X, TOKENS),
        "hidden_moments": moments_of(what.hidden, TOKENS),
        "inputs": np.asarray(X)[np.asarray(TOKENS)],
        "sensitivity": Sensitivity(np.ones(int(TOKENS.sum()), np.float32), np.eye(X.shape[-1], dtype=np.float32)),
    }
    if isinstance(method, TrainedMethod):
        rng = np.random.default_rng(0)
        gate = method.init((64, 24), jax.random.key(0))
        parts["gate"] = jax.tree.map(lambda leaf: jnp.float32(rng.standard_normal(leaf.shape)), gate)
    return FitMaterial(weights, **{name: part for name, part in parts.items() if name in method.requires})


@jax.jit
def kept_by(selector):
    """What a selector keeps of the neurons, or of the channels, for each token."""
    selection = selector(WEIGHTS, X, TOKENS)
    active = selection.per_token(TOKENS.shape, len(WEIGHTS.w_in))
    return active if selection.channels is None else selection.channels


@pytest.mark.parametrize("name", TUNED)
def test_it_keeps_about_the_density_it_is_given(name):
    method = small(name)
    material = material_for(method)
    what = trace(WEIGHTS, X, TOKENS)
    histogram = None
    if method.tuned_by == "threshold":
        histogram = jax.device_get(score_histogram(method.fit(material), WEIGHTS, what))
    fires = float((np.asarray(what.hidden) > 0)[np.asarray(TOKENS)].mean())
    selectors = method.at_densities(material, partial(density_threshold, histogram), DENSITIES)
    if not method.shares_density:
        assert len({jax.tree.structure(selector) for selector in selectors}) == 1  # one program serves them all
    shares = []
    for selector, density in zip(selectors, DENSITIES, strict=True):
        shares.append(float(np.asarray(kept_by(selector))[np.asarray(TOKENS)].mean()))
        assert shares[-1] <= density + 1e-6
        expected = min(density, fires) if selector.traits.granularity == "neuron" and density < 1 else density
        assert shares[-1] >= 0.6 * expected
    assert shares == sorted(shares, reverse=True) and shares[0] == 1


@pytest.mark.parametrize("name", METHODS)
def test_it_says_of_itself_what_its_selectors_do(name):
    method = small(name)
    if method.tuned_by == "nothing":
        selector = method.fit(material_for(method))
    else:
        (selector,) = selectors_at_densities(
            StandaloneFFNs({"f": WEIGHTS}),
            CachedBatches([FFNInputs({"f": X}, {"f": TOKENS})]),
            method,
            {"f": material_for(method)},
            (0.5,),
        )["f"]
    if method.tuned_by == "threshold":
        assert method.unit == getattr(method.fit(material_for(method)), "unit", None)
    traits = selector.traits
    assert (traits.saves, traits.dynamic) == (method.saves, method.dynamic)
    if name != "static-reconstructed":  # its sets are of groups of one neuron
        assert traits.granularity == method.decides
    needs = {frozenset(): "nothing", frozenset({"gate"}): "training"}.get(method.requires, "statistics")
    assert traits.needs in (needs, "statistics")  # magnitudes need quantiles, which no material holds
    assert STORABLE[type(selector).__name__] is type(selector)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if issubclass(m, TrainedMethod)])
def test_gates_that_methods_share_are_the_same(name):
    method = dataclasses.replace(METHODS[name](), group_size=SIZE, epochs=3, seed=7)
    shared = method.gates
    assert shared.gates == shared and (shared.group_size, shared.epochs, shared.seed) == (SIZE, 3, 7)
    one, other = (of.init((64, 24), jax.random.key(0)) for of in (method, shared))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    what = trace(WEIGHTS, X, TOKENS)
    assert method.loss(one, WEIGHTS, what) == shared.loss(other, WEIGHTS, what)


def test_methods_are_found_by_name():
    assert named("mgs") == METHODS["mgs"]() and hash(named("mgs")) == hash(METHODS["mgs"]())
    with pytest.raises(InputError, match=r"there is no method 'mgz'; there are .*mgs"):
        named("mgz")


def test_the_table_in_the_docs_is_current():
    page = (Path(__file__).parents[1] / "docs/methods.md").read_text()
    built_in = [method for method in METHODS.values() if method.__module__.startswith("detr_jax.")]
    assert methods_table(built_in) in page


def test_a_method_from_outside_is_registered():
    assert METHODS["largest-input"] is LargestInput
    selector = Thresholded(named("largest-input").fit(FitMaterial(WEIGHTS)), jnp.float32(0))
    assert selector(WEIGHTS, X, TOKENS).active.shape == (*TOKENS.shape, 16)


def test_a_method_from_outside_goes_through_a_plan_file(tmp_path):
    model = tiny_detector()
    weights = model.ffn_weights()
    selectors = {
        name: Thresholded(named("largest-input").fit(FitMaterial(of_ffn)), jnp.float32(1))
        for name, of_ffn in weights.items()
    }
    plan = Plan("largest-input", fingerprint(model), selectors, {}, {}, {}, {})
    save_plan(plan, tmp_path / "plan.safetensors")
    found = load_plan(tmp_path / "plan.safetensors", model)
    assert jax.tree.structure(dict(found.selectors)) == jax.tree.structure(selectors)
    assert isinstance(found.selectors["encoder.0"].score, InputSize)


@pytest.mark.parametrize("name", METHODS)
def test_an_ffn_that_is_never_active_is_closed_or_named(name):
    silent = WEIGHTS._replace(b_in=WEIGHTS.b_in - 1e4)
    method = small(name)
    material = material_for(method, silent)
    if name == "sibs":
        with pytest.raises(InputError, match=r"decoder\.0: no neuron is active"):
            method.fit(dataclasses.replace(material, name="decoder.0"))
        return
    threshold = -jnp.inf
    if method.tuned_by == "threshold":
        histogram = jax.device_get(score_histogram(method.fit(material), silent, trace(silent, X, TOKENS)))
        threshold = recall_threshold(histogram, 0.99)
        assert threshold == jnp.inf  # no group has to be found
    if isinstance(method, TrainedMethod):
        loss, gradients = jax.value_and_grad(method.loss)(material.gate, silent, trace(silent, X, TOKENS))
        assert np.isfinite([loss, *(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients))]).all()
    (selector,) = (
        method.at_densities(material, lambda _: threshold, (0.5,)) if name in TUNED else (method.fit(material),)
    )
    assert np.isfinite(forward(silent, X, selector(silent, X, TOKENS))).all()
