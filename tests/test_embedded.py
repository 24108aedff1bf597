"""The detectors that come with the package are what their model cards say."""

import importlib.resources
import json

import numpy as np
import pytest

import detr_jax
from detr_jax.data.features import backbone_features
from detr_jax.data.scenes import ScenesDataset
from detr_jax.evaluation.coco_ap import score
from detr_jax.evaluation.runs import measure_dataset
from detr_jax.training.detector.card import model_card
from detr_jax.weights import EMBEDDED

FILES = importlib.resources.files("detr_jax.weights")


@pytest.fixture(scope="module", params=EMBEDDED)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def report(name):
    return json.loads((FILES / f"{name}.json").read_text())


def test_its_files_belong_together(name, report):
    assert detr_jax.fingerprint(detr_jax.load(name)) == report["fingerprint"]
    assert (FILES / f"{name}.md").read_text() == model_card(report)
    assert len((FILES / f"{name}.safetensors").read_bytes()) <= 12e6


@pytest.mark.slow
def test_its_accuracy_and_its_zeros(name, report):
    dataset = ScenesDataset("val", side=EMBEDDED[name])
    model = detr_jax.load(name)
    batches = backbone_features(model, dataset, 8, "validation scenes")
    measured = measure_dataset(model, batches, selectors={}, group_size=8)
    numbers = score(dataset.ground_truth(), measured.results, dataset.image_ids()).numbers
    assert numbers["AP"] >= 0.50
    # Another machine's rounding reorders a few detections of equal score.
    expected = {name: value if value >= 0 else np.nan for name, value in report["numbers"].items()}
    assert numbers == pytest.approx(expected, abs=2e-3, nan_ok=True)
    zeros = {name: counts.zeros for name, counts in measured.counts.items()}
    assert zeros == pytest.approx(report["zeros"], abs=1e-4)
    assert sum(zeros.values()) / len(zeros) >= 0.93


def test_its_plan_loses_nothing_and_says_so(name):
    """The few scenes here only tell that it works; the plan says what was measured on many."""
    model = detr_jax.load_sparse(name)
    assert model.plan.fingerprint == detr_jax.fingerprint(model.dense)
    measured = model.plan.measured
    assert measured["images"] >= 500 and abs(measured["numbers"]["AP"] - measured["dense_AP"]) < 0.005
    scenes = ScenesDataset("val", 4, EMBEDDED[name])
    sparse, dense = (detr_jax.detect(m, [scenes[i].image for i in range(4)]) for m in (model, detr_jax.load(name)))
    for one, other in zip(sparse, dense, strict=True):
        assert sorted(one.names) == sorted(other.names)
        np.testing.assert_allclose(np.sort(one.scores), np.sort(other.scores), atol=0.05)
