"""Plan files: there and back, and everything that can be wrong with one."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open
from scipy.special import expit
from tiny import TINY_CONFIG, every_selector, tiny_detector, tiny_ffn

import detr_jax
from detr_jax.methods import LinearGate, Standardised, Thresholded
from detr_jax.plan import Plan, load_plan, save_plan

ORDER = np.random.default_rng(1).permutation(TINY_CONFIG.encoder_ffn_dim)
SELECTORS = every_selector(tiny_ffn(TINY_CONFIG.encoder_ffn_dim, TINY_CONFIG.d_model)[0], 8)


@pytest.fixture(scope="module")
def model():
    return tiny_detector()


def plan_with(model, selectors, orders=None) -> Plan:
    return Plan("mgs", detr_jax.fingerprint(model), selectors, orders or {}, {"epochs": 5}, {"AP": 0.5}, {"jax": "1"})


@pytest.fixture
def path(tmp_path, model):
    rng = np.random.default_rng(0)
    gates = {
        name: Thresholded(
            LinearGate(np.float32(rng.standard_normal((16, 4))), np.zeros(4, np.float32)), jnp.float32(0.2)
        )
        for name in TINY_CONFIG.ffn_names
    }
    save_plan(plan_with(model, gates, {"decoder.0": ORDER}), tmp_path / "plan.safetensors")
    return tmp_path / "plan.safetensors"


def rewrite(path, *, header=None, arrays=None, selectors=None):
    """The same file with some of its header, arrays or described selectors replaced; None takes one out."""
    with safe_open(path, framework="numpy") as file:
        old_header, old_arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if selectors is not None:
        description = json.loads(old_header["description"])
        both = description["selectors"] | selectors
        description["selectors"] = {name: structure for name, structure in both.items() if structure is not None}
        old_header["description"] = json.dumps(description)
    new_header = {k: v for k, v in (old_header | (header or {})).items() if v is not None}
    new_arrays = {k: v for k, v in (old_arrays | (arrays or {})).items() if v is not None}
    safetensors.numpy.save_file(new_arrays, path, metadata=new_header)


def test_a_plan_comes_back_as_it_was(path, model):
    plan = load_plan(path, model)
    assert (plan.method, plan.training, plan.measured) == ("mgs", {"epochs": 5}, {"AP": 0.5})
    assert tuple(plan.selectors) == TINY_CONFIG.ffn_names
    kernel = np.float32(np.random.default_rng(0).standard_normal((16, 4)))
    np.testing.assert_array_equal(plan.selectors["encoder.0"].score.kernel, kernel)
    assert plan.selectors["encoder.0"].threshold == jnp.float32(0.2)
    assert list(plan.permutations) == ["decoder.0"]
    np.testing.assert_array_equal(plan.permutations["decoder.0"], ORDER)
    assert [p.name for p in path.parent.iterdir()] == ["plan.safetensors"]


@pytest.mark.parametrize("name", SELECTORS)
def test_selectors_of_every_kind_come_back_as_they_were(tmp_path, model, name):
    selectors = {"encoder.0": SELECTORS[name], "decoder.0": SELECTORS["oracle"]}
    save_plan(plan_with(model, selectors), tmp_path / "plan.safetensors")
    found = dict(load_plan(tmp_path / "plan.safetensors", model).selectors)
    assert {ffn: type(selector) for ffn, selector in found.items()} == {f: type(s) for f, s in selectors.items()}
    assert jax.tree.structure(found) == jax.tree.structure(selectors)
    assert str(jax.tree.structure(found)) == str(jax.tree.structure(selectors))  # no array that equals a static field
    jax.tree.map(np.testing.assert_array_equal, found, selectors)
    assert [a.dtype for a in jax.tree.leaves(found)] == [a.dtype for a in jax.tree.leaves(selectors)]


@pytest.mark.parametrize("threshold", [-np.inf, np.inf])
def test_thresholds_may_be_infinite(tmp_path, model, threshold):
    selectors = {"encoder.0": Thresholded(Standardised(SELECTORS["linear gate"].score), jnp.float32(threshold))}
    save_plan(plan_with(model, selectors), tmp_path / "plan.safetensors")
    assert load_plan(tmp_path / "plan.safetensors", model).selectors["encoder.0"].threshold == threshold


def test_an_ffn_without_a_selector_stays_dense(path, model):
    entries = ("score.kernel", "score.bias", "threshold")
    rewrite(path, selectors={"encoder.0": None}, arrays={f"encoder.0.selector.{entry}": None for entry in entries})
    assert tuple(load_plan(path, model).selectors) == ("decoder.0",)


def test_the_plan_of_another_detector_is_refused(path):
    with pytest.raises(ValueError, match="was made for the detector"):
        load_plan(path, tiny_detector(seed=1))


KERNEL, BIAS, THRESHOLD = (f"encoder.0.selector.{entry}" for entry in ("score.kernel", "score.bias", "threshold"))
SCORE = {"class": "LinearGate", "kernel": {"array": KERNEL}, "bias": {"array": BIAS}}
DESCRIPTION = dict.fromkeys(("method", "fingerprint", "training", "measured", "versions"), "") | {"selectors": None}


def with_score(score: dict) -> dict:
    """A change of the encoder's selector to another score."""
    return {"selectors": {"encoder.0": {"class": "Thresholded", "score": score, "threshold": {"array": THRESHOLD}}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"header": {"format": "detr-jax"}}, "does not hold a plan: its format is 'detr-jax'"),
        ({"header": {"format_version": "0"}}, "has format version 0, which this detr-jax does not read any more"),
        ({"header": {"format_version": "1"}}, "is damaged: it is no version 1 of a plan"),
        ({"header": {"format_version": "2"}}, "is damaged: it is no version 2 of a plan"),
        ({"header": {"format_version": "3"}, "selectors": {"encoder.0": {}}}, "has a selector|is missing or wrong"),
        ({"header": {"format_version": "5"}}, "has format version 5; this detr-jax reads up to 4: update it"),
        ({"header": {"format_version": "new"}}, "is damaged: its format_version is 'new', not a number"),
        ({"header": {"format_version": None}}, "is damaged: its format_version is ''"),
        ({"header": {"description": "{"}}, "header has no description"),
        ({"header": {"description": None}}, "header has no description"),
        ({"header": {"description": "[]"}}, "description is a list"),
        ({"header": {"description": json.dumps({"method": "mgs"})}}, "should be .'fingerprint', 'measured'"),
        ({"header": {"description": json.dumps(DESCRIPTION)}}, "its selectors are a NoneType"),
        ({"arrays": {BIAS: None}}, rf"KeyError\('{BIAS}'\) is missing"),
        ({"arrays": {"encoder.0.more": np.zeros(1)}}, r"entries \['encoder.0.more'\] are left over"),
        (
            {"arrays": {"encoder.9.selector.threshold": np.zeros(())}},
            r"entries \['encoder.9.selector.threshold'\] are left over",
        ),
        ({"selectors": {"encoder.9": {"class": "Oracle", "group_size": 8}}}, r"selectors for \['encoder.9'\]"),
        ({"arrays": {KERNEL: np.zeros((15, 4))}}, r"not fit its FFN.*kernel.*\(15, 4\)"),
        ({"arrays": {KERNEL: np.zeros(16), BIAS: np.zeros(2)}}, r"not fit its FFN.*kernel.*\(16,\)"),
        ({"arrays": {THRESHOLD: np.zeros(4)}}, r"threshold has the shape \(4,\)"),
        ({"arrays": {KERNEL: np.zeros((16, 5)), BIAS: np.zeros(5)}}, r"not fit its FFN.*\(16, 5\)"),
        (
            {"arrays": {"decoder.0.permutation": np.zeros(32, np.int32)}},
            "decoder.0.permutation does not name each of 32",
        ),
        ({"arrays": {"decoder.7.permutation": np.arange(32)}}, r"has permutations for \['decoder.7'\]"),
        (
            {"arrays": {"decoder.0.selector.score.bias": np.full(4, np.nan, np.float32)}},
            "decoder.0.selector.score.bias holds NaN",
        ),
        ({"arrays": {KERNEL: np.full((16, 4), np.inf, np.float32)}}, f"{KERNEL} holds NaN or infinite"),
        ({"arrays": {THRESHOLD: np.full((), np.nan, np.float32)}}, f"{THRESHOLD} holds NaN"),
        (with_score(SCORE | {"class": "QuadraticGate"}), "a selector of the class 'QuadraticGate', which"),
        (with_score({k: v for k, v in SCORE.items() if k != "class"}), r"KeyError\('class'\) is missing"),
        (with_score(SCORE | {"more": 1}), "unexpected keyword argument 'more'"),
        (with_score({"class": "LinearGate", "kernel": {"array": KERNEL}}), "missing 1 required .* 'bias'"),
        (with_score({"class": "Standardised", "of": SCORE | {"class": "Importance"}}), "unexpected .* 'kernel'"),
        ({"selectors": {"encoder.0": SCORE}, "arrays": {THRESHOLD: None}}, "not fit its FFN"),
        (
            {"selectors": {"encoder.0": {"class": "Oracle", "group_size": 5}}}
            | {"arrays": dict.fromkeys((KERNEL, BIAS, THRESHOLD))},
            "not fit its FFN",
        ),
        ({"selectors": {"encoder.0": 5}, "arrays": dict.fromkeys((KERNEL, BIAS, THRESHOLD))}, "not fit its FFN"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_wrong_plan_is_refused(path, model, change, message):
    rewrite(path, **change)
    with pytest.raises(ValueError, match=message):
        load_plan(path, model)


def test_a_truncated_plan_is_refused(path, model):
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        load_plan(path, model)


def test_a_missing_plan_says_how_to_make_one(tmp_path, model):
    with pytest.raises(FileNotFoundError, match="train_gates"):
        load_plan(tmp_path / "plan.safetensors", model)


@pytest.fixture(scope="module")
def embedded():
    return detr_jax.load("detr-tiny")


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_earlier_versions_load(embedded, version):
    """The code of that version trained them: `train_gates.py --group-size 32 --train-images 512 --epochs 3`."""
    path = Path(__file__).parent / f"data/detr-tiny-plan-v{version}.safetensors"
    with safe_open(path, framework="numpy") as file:
        assert file.metadata()["format_version"] == str(version)
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    plan = load_plan(path, embedded)
    assert (plan.method, plan.training["data"]) == ("mgs", "scenes-train[0:512]")
    assert set(plan.selectors) == set(embedded.config.ffn_names)
    assert set(plan.permutations) == (set(plan.selectors) if version == 2 else set())
    rng = np.random.default_rng(0)
    x = 4 * rng.standard_normal((1, 50, embedded.config.d_model)).astype(np.float32)
    for name, selector in plan.selectors.items():
        active = selector(None, x, None).active
        # What a gate was then: a probability and a threshold that is one.
        probability = expit(x @ stored[f"{name}.kernel"] + stored[f"{name}.bias"])
        sure = np.abs(probability - stored[f"{name}.threshold"]) > 1e-5
        np.testing.assert_array_equal(active[sure], (probability >= stored[f"{name}.threshold"])[sure])
        assert 0 < active.mean() < 1
    for name, order in plan.permutations.items():
        np.testing.assert_array_equal(order, stored[f"{name}.order"])


@pytest.mark.parametrize("version", [1, 2, 3])
def test_plans_of_earlier_versions_give_the_outputs_that_they_gave(embedded, version):
    """The logits are those of the last commit that wrote version 3, 345e4d6."""
    folder = Path(__file__).parent / "data"
    sparse = detr_jax.load_sparse(embedded, folder / f"detr-tiny-plan-v{version}.safetensors")
    images = np.random.default_rng(0).standard_normal((2, 64, 96, 3)).astype(np.float32)
    expected = np.load(folder / "detr-tiny-plan-logits.npz")[f"v{version}"]
    np.testing.assert_allclose(sparse(images).logits, expected, atol=5e-4)
    assert np.abs(embedded(images).logits - expected).max() > 0.05  # dense outputs are others


OLD_NAMES = {
    "PartitionedSelector": "Sectioned",
    "LowRankCompensation": "Compensated",
    "OutputLayer": "SecondLayer",
    "IndicatorSelector": "Sibs",
    "Random": "Lots",
}


@pytest.mark.parametrize("name", ["fixed", "sections for images", "fixed set", "compensated groups", "sibs", "lots"])
def test_files_of_version_3_load_with_the_names_of_that_time(tmp_path, model, name):
    path = tmp_path / "plan.safetensors"
    save_plan(plan_with(model, {"encoder.0": SELECTORS[name]}, {"decoder.0": ORDER}), path)
    with safe_open(path, framework="numpy") as file:
        description = file.metadata()["description"]
    for new, old in OLD_NAMES.items():
        description = description.replace(f'"class": "{new}"', f'"class": "{old}"')
    header = {"format_version": "3", "description": description}
    rewrite(path, header=header, arrays={"decoder.0.permutation": None, "decoder.0.order": np.int32(ORDER)})
    found = load_plan(path, model)
    assert jax.tree.structure(found.selectors["encoder.0"]) == jax.tree.structure(SELECTORS[name])
    jax.tree.map(np.testing.assert_array_equal, found.selectors["encoder.0"], SELECTORS[name])
    np.testing.assert_array_equal(found.permutations["decoder.0"], ORDER)


def test_a_plan_is_not_overwritten_without_being_told(path, model):
    plan, before = load_plan(path, model), path.read_bytes()
    with pytest.raises(
        FileExistsError, match=r"plan\.safetensors exists; save the plan under another name or pass over"
    ):
        save_plan(dataclasses.replace(plan, method="other"), path)
    assert path.read_bytes() == before
    save_plan(dataclasses.replace(plan, method="other"), path, overwrite=True)
    assert load_plan(path, model).method == "other"
