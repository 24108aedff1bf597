"""A detector unlike DETR goes through everything: one folder and one registry line are enough for an architecture."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import annotation, detect_dataset, write_coco
from toy_detector import ToyConfig, ToyDetector, toy_detector

import detr_jax
from detr_jax.calibration.activations import profile_activations
from detr_jax.calibration.permutation import coactivation_permutation
from detr_jax.calibration.thresholds import calibrate, recall_threshold
from detr_jax.calibration.token_kinds import object_tokens
from detr_jax.data.batches import CachedBatches
from detr_jax.data.features import backbone_features
from detr_jax.data.loading import batches
from detr_jax.evaluation.flops import dense_flops
from detr_jax.evaluation.padding import padding_effect
from detr_jax.methods import MGS
from detr_jax.training.gates import train_gates

SIZES = [(32, 40), (40, 32), (32, 64)]


@pytest.fixture(scope="module")
def model():
    return toy_detector()


@pytest.fixture(scope="module")
def data(model, tmp_path_factory):
    """Images of three shapes whose objects are what the detector finds, so that its AP says something."""
    root = write_coco(tmp_path_factory.mktemp("coco"), SIZES * 2, [])
    found = detect_dataset(model, detr_jax.open_dataset(f"coco:{root}", "val"), 2)
    path = root / "annotations/instances_val2017.json"
    objects = [annotation(i, r["image_id"], r["bbox"], r["category_id"]) for i, r in enumerate(found, 1)]
    objects = [o for o in objects if o["category_id"]]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": objects}))
    return detr_jax.open_dataset(f"coco:{root}", "val")


@pytest.fixture(scope="module")
def profile(model, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("statistics") / "activations.safetensors"
    return profile_activations(model, data, 2, path, lambda images: None)


@pytest.fixture(scope="module")
def sparse(model, data, profile, tmp_path_factory):
    """Permuted, gated by MGS, calibrated, written to a plan file and read again."""
    orders = {name: coactivation_permutation(s.coactive, 4) for name, s in profile.statistics.items()}
    permuted = model.with_permutations(orders)
    features = CachedBatches([batch.tokens for batch in backbone_features(model, data, 2, None)])
    folder = tmp_path_factory.mktemp("gates")
    method = MGS(group_size=4, epochs=20)
    gates = train_gates(permuted, features, {"mgs": method}, folder / "state", lambda step, loss: None)["mgs"]
    selectors = calibrate(permuted, features, gates, lambda histogram: recall_threshold(histogram, 0.9))
    plan = detr_jax.Plan("mgs", detr_jax.fingerprint(model), selectors, orders, {}, {}, {})
    detr_jax.save_plan(plan, folder / "plan.safetensors")
    return detr_jax.load_sparse(model, folder / "plan.safetensors")


def test_its_file_says_its_architecture(model, tmp_path):
    detr_jax.save(model, tmp_path / "toy.safetensors")
    loaded = detr_jax.load(tmp_path / "toy.safetensors")
    assert isinstance(loaded, ToyDetector) and loaded.config == ToyConfig()
    assert detr_jax.fingerprint(loaded) == detr_jax.fingerprint(model)
    with pytest.raises(ValueError, match="is not a detr-tiny: it is a ToyConfig"):
        detr_jax.load(tmp_path / "toy.safetensors", preset="detr-tiny")


def test_statistics_know_tokens_of_both_grids_and_queries(model, data, profile):
    assert profile.kinds == {
        "fine": ("background", "object"),
        "both": ("background", "object"),
        "queries": ("unmatched", "matched"),
    }
    (batch, *_) = batches(data, model.preprocessing, 2)
    height, width = batch.pixel_mask.shape[1:]
    kinds = object_tokens(batch, model)
    assert [k.shape[1] for k in kinds] == [height * width // 64, height * width // 256]
    assert all((k == 1).any() and (k == 0).any() for k in kinds)
    for name, spec in model.ffn_specs().items():
        assert profile.statistics[name].coactive.shape == (spec.hidden, spec.hidden)


def test_flops_count_the_tokens_of_each_ffn(model):
    flops = dense_flops(model, 32, 64)
    assert flops.ffns == {"fine": 4.0 * 8 * 24 * 32, "both": 4.0 * 16 * 32 * 40, "queries": 4.0 * 16 * 32 * 5}
    assert sum(flops.ffns.values()) < flops.transformer < flops.detector


def test_inspect_shows_both_grids(sparse, data):
    layers = sparse.inspect(*detr_jax.preprocess_images(data[0].image, sparse.preprocessing))
    assert {name: layer.grids for name, layer in layers.items()} == {
        "fine": ((4, 5),),
        "both": ((4, 5), (2, 3)),
        "queries": (),
    }
    for layer in layers.values():
        assert layer.density < 1 and layer.recall > 0.7


@pytest.mark.parametrize("implementation", ["masked", "xla"])
def test_evaluation_pairs_sparse_and_dense(sparse, data, implementation):
    scores = detr_jax.evaluate(sparse, data, batch_size=2, group_size=4, implementation=implementation, progress=False)
    assert scores.dense_ap > 0.9 and 0 < scores.density < 1 and 0 < scores.divergence < 0.2
    assert set(scores.counts) == {"fine", "both", "queries"}


def test_detections_are_those_of_sigmoids(model, sparse, data):
    dense = detr_jax.detect(model, data[0].image, 0.0)
    outputs = model(*detr_jax.preprocess_images(data[0].image, model.preprocessing))
    np.testing.assert_allclose(dense.scores, np.sort(jax.nn.sigmoid(outputs.log_odds[0]).max(-1))[::-1], atol=1e-5)
    assert len(sparse.detect(data[0].image, 0.0)) == len(dense) == 5


def test_padding_report_names_its_outputs(model, data):
    assert set(padding_effect(model, data, 2)["change"]) == {"log_odds", "boxes", "scores"}


def test_the_dense_detector_is_the_same_function_whatever_the_permutation(model, sparse, data):
    pixels = detr_jax.preprocess_images(data[0].image, model.preprocessing)
    np.testing.assert_allclose(sparse(*pixels, selectors={}).log_odds, model(*pixels).log_odds, atol=1e-5)
    assert detr_jax.fingerprint(sparse.dense) == detr_jax.fingerprint(model)


def test_a_plan_for_another_size_of_ffn_is_refused(model, sparse):
    wrong = {"fine": sparse.plan.selectors["both"]}
    with pytest.raises(ValueError, match="the selector of fine does not fit its FFN"):
        sparse.with_plan(dataclasses.replace(sparse.plan, selectors=wrong))
    with pytest.raises(ValueError, match=r"no FFN is named \['encoder.0'\]; this detector has \['fine', 'both'"):
        model(jnp.zeros((1, 32, 32, 3)), selectors={"encoder.0": sparse.plan.selectors["both"]})
