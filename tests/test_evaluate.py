"""`detr_jax.evaluate`: AP with intervals, the sparse detector paired with the dense one, data without annotations."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import annotation, detect_dataset, tiny_detector, write_coco

import detr_jax
from detr_jax.evaluation.coco_ap import bootstrap, bootstrap_difference, confidence_interval, score
from detr_jax.evaluation.evaluate import evaluate_selections
from detr_jax.methods import LinearGate, Thresholded


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Images of three shapes, with the detections of the detector as objects, so that AP is above 0."""
    root, sizes = tmp_path_factory.mktemp("coco"), [(32, 40), (40, 32), (32, 64)] * 2
    data = detr_jax.open_dataset(f"coco:{write_coco(root, sizes, [])}", "val")
    found = detect_dataset(tiny_detector(2), data, 2)
    truth = json.loads((root / "annotations/instances_val2017.json").read_text())
    truth["annotations"] = [
        annotation(i, r["image_id"], r["bbox"], r["category_id"]) for i, r in enumerate(found, 1) if r["category_id"]
    ]
    (root / "annotations/instances_val2017.json").write_text(json.dumps(truth))
    return root


@pytest.fixture(scope="module")
def data(coco):
    return detr_jax.open_dataset(f"coco:{coco}", "val")


def sparse_detector(threshold: float = 0.0) -> detr_jax.SparseDETR:
    model, rng = tiny_detector(2), np.random.default_rng(1)
    shape = (model.config.d_model, model.config.encoder_ffn_dim // 4)
    gate = LinearGate(jnp.asarray(rng.normal(0, 1, shape), jnp.float32), jnp.zeros(shape[1]))
    selectors = dict.fromkeys(model.config.ffn_names, Thresholded(gate, jnp.float32(threshold)))
    return detr_jax.SparseDETR.of(model, detr_jax.Plan("mgs", detr_jax.fingerprint(model), selectors, {}, {}, {}, {}))


@pytest.fixture(scope="module")
def scores(data):
    return detr_jax.evaluate(sparse_detector(), data, batch_size=2, group_size=4, progress=False)


def test_it_is_the_ap_of_the_detections_with_a_paired_difference(data, scores):
    sparse = sparse_detector()
    truth, ids = data.ground_truth(), data.image_ids()
    dense, ours = (
        score(truth, detect_dataset(sparse.detector, data, 2, selectors=selectors), ids)
        for selectors in ({}, sparse.plan.selectors)
    )
    assert scores.dense_ap == pytest.approx(dense.numbers["AP"])
    assert scores.ap == pytest.approx(ours.numbers["AP"]) and 0 < scores.ap < scores.dense_ap
    assert scores.difference == scores.ap - scores.dense_ap
    np.testing.assert_allclose(scores.interval, confidence_interval(bootstrap(ours)), rtol=1e-6)
    difference = confidence_interval(bootstrap_difference(ours, dense))
    np.testing.assert_allclose(scores.difference_interval, difference, rtol=1e-6)
    assert scores.divergence > 0 and 0.3 < scores.density < 0.7
    # The masked reference computes everything.
    assert set(scores.executed.values()) == {1.0}


def test_what_is_executed_is_counted(data):
    few = detr_jax.evaluate(
        sparse_detector(1.0),
        data,
        batch_size=2,
        group_size=4,
        implementation=detr_jax.kernels.Execution(16, 4, implementation="reference"),
        progress=False,
    )
    assert few.density < few.executed_density < 1
    assert few.to_json()["executed_density"] == few.executed_density


def test_a_dense_detector_is_compared_with_nothing(data):
    scores = detr_jax.evaluate(tiny_detector(2), data, batch_size=2, group_size=4, progress=False)
    assert scores.ap > 0
    assert (scores.difference, scores.difference_interval, scores.divergence) == (None, None, None)
    assert scores.density == 1 and "dense" not in str(scores)


def test_without_annotations_there_is_divergence_and_no_ap(tmp_path, coco):
    for path in (coco / "val2017").iterdir():
        Image.open(path).save(tmp_path / path.name)
    photographs = detr_jax.open_dataset(f"images:{tmp_path}", "all")
    scores = detr_jax.evaluate(sparse_detector(), photographs, batch_size=2, group_size=4, progress=False)
    assert (scores.numbers, scores.ap, scores.interval, scores.difference) == (None,) * 4
    assert scores.divergence > 0 and "AP is undefined" in str(scores) and "divergence" in str(scores)
    assert "-1" not in json.dumps(scores.to_json(), allow_nan=False)


def test_an_undefined_number_is_none(tmp_path):
    crowd = annotation(1, 1, (4, 4, 20, 20), iscrowd=1)
    data = detr_jax.open_dataset(f"coco:{write_coco(tmp_path, [(32, 40)], [crowd])}", "val")
    scores = detr_jax.evaluate(sparse_detector(), data, batch_size=1, group_size=4, progress=False)
    assert scores.ap is None and scores.interval is None and scores.difference_interval is None
    assert scores.divergence > 0 and "AP          -" in str(scores)
    json.dumps(scores.to_json(), allow_nan=False)


def test_it_prints_a_short_table_and_is_json(scores):
    lines = str(scores).splitlines()
    assert len(lines) < 20 and lines[1].startswith("AP ") and "minus dense" in lines[1]
    found = scores.to_json()
    assert found == json.loads(json.dumps(found)) | {
        key: found[key] for key in ("AP_interval", "AP_minus_dense_interval")
    }
    assert found["ffns"]["encoder.0"]["executed"] == 1


def test_one_pass_gives_what_each_pass_gives(data, scores):
    sparse, strict = sparse_detector(), sparse_detector(2.0)
    of = {"sparse": sparse.plan.selectors, "dense": {}, "strict": strict.plan.selectors}
    together = evaluate_selections(sparse.detector, data, of, 2, group_size=4, progress=False)
    assert list(together) == ["dense", "sparse", "strict"]
    assert together["sparse"].to_json() == scores.to_json()
    alone = detr_jax.evaluate(strict, data, batch_size=2, group_size=4, progress=False)
    assert together["strict"].to_json() == alone.to_json()


def test_a_plan_that_is_used_far_from_its_calibration_is_noticed(data):
    sparse = sparse_detector()
    plan = dataclasses.replace(sparse.plan, measured={"mean_group_sparsity": 0.9})
    with pytest.warns(UserWarning, match=r"keeps .*% of the hidden neurons on val2017, for 10.0% on the images"):
        detr_jax.evaluate(sparse.with_plan(plan), data, batch_size=2, group_size=4, progress=False)
