"""Plan files: there and back, and everything that can be wrong with one."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open
from tiny import TINY_CONFIG, tiny_detector

import detr_jax
from detr_jax.sparsity import Plan, load_plan, save_plan
from detr_jax.sparsity.gates import initial_gates

ORDER = np.random.default_rng(1).permutation(TINY_CONFIG.ffn_features)


@pytest.fixture(scope="module")
def model():
    return tiny_detector()


@pytest.fixture
def path(tmp_path, model):
    rng = np.random.default_rng(0)
    gates = {
        name: dataclasses.replace(gate, kernel=np.float32(rng.standard_normal(gate.kernel.shape)))
        for name, gate in initial_gates(TINY_CONFIG, 8).items()
    }
    plan = Plan(
        "mgs", detr_jax.fingerprint(model), gates, {"decoder.0": ORDER}, {"epochs": 5}, {"AP": 0.5}, {"jax": "1"}
    )
    save_plan(plan, tmp_path / "plan.safetensors")
    return tmp_path / "plan.safetensors"


def rewrite(path, *, header=None, arrays=None):
    """The same file with some of its header or arrays replaced; None takes one out."""
    with safe_open(path, framework="numpy") as file:
        old_header, old_arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    new_header = {k: v for k, v in (old_header | (header or {})).items() if v is not None}
    new_arrays = {k: v for k, v in (old_arrays | (arrays or {})).items() if v is not None}
    safetensors.numpy.save_file(new_arrays, path, metadata=new_header)


def test_a_plan_comes_back_as_it_was(path, model):
    plan = load_plan(path, model)
    assert (plan.method, plan.training, plan.measured) == ("mgs", {"epochs": 5}, {"AP": 0.5})
    assert tuple(plan.gates) == TINY_CONFIG.ffn_names
    kernel = np.float32(np.random.default_rng(0).standard_normal((16, 4)))
    np.testing.assert_array_equal(plan.gates["encoder.0"].kernel, kernel)
    assert list(plan.orders) == ["decoder.0"]
    np.testing.assert_array_equal(plan.orders["decoder.0"], ORDER)
    assert [p.name for p in path.parent.iterdir()] == ["plan.safetensors"]


def test_an_ffn_without_a_gate_stays_dense(path, model):
    rewrite(path, arrays={f"encoder.0.{array}": None for array in ("kernel", "bias", "threshold")})
    assert tuple(load_plan(path, model).gates) == ("decoder.0",)


def test_the_plan_of_another_detector_is_refused(path):
    with pytest.raises(ValueError, match="was made for the detector"):
        load_plan(path, tiny_detector(seed=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"header": {"format": "detr-jax"}}, "does not hold a plan: its format is 'detr-jax'"),
        ({"header": {"format_version": "1"}}, "has version '1'; this detr-jax reads version 2"),
        ({"header": {"format_version": None}}, "has version None"),
        ({"header": {"description": "{"}}, "header has no description"),
        ({"header": {"description": None}}, "header has no description"),
        ({"header": {"description": "[]"}}, "description is a list"),
        (
            {"header": {"description": json.dumps({"method": "mgs"})}},
            "should be .'fingerprint', 'measured'",
        ),
        ({"arrays": {"encoder.0.bias": None}}, r"entries \['encoder.0.bias'\] are missing"),
        ({"arrays": {"encoder.0.more": np.zeros(1)}}, r"entries \['encoder.0.more'\] are missing or left over"),
        ({"arrays": {"encoder.9.bias": np.zeros(1)}}, r"gates for \['encoder.9'\]"),
        ({"arrays": {"encoder.0.kernel": np.zeros((15, 4))}}, r"kernel \(15, 4\)"),
        ({"arrays": {"encoder.0.threshold": np.zeros(4)}}, r"threshold \(4,\)"),
        (
            {"arrays": {"encoder.0.kernel": np.zeros((16, 5)), "encoder.0.bias": np.zeros(5)}},
            "5 groups of encoder.0 do not divide 32",
        ),
        ({"arrays": {"decoder.0.order": np.zeros(32, np.int32)}}, "decoder.0.order does not name each of 32"),
        ({"arrays": {"decoder.7.order": np.arange(32)}}, "decoder.7.order does not name"),
        ({"arrays": {"decoder.0.bias": np.full(4, np.nan, np.float32)}}, "decoder.0.bias holds NaN"),
    ],
)
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
