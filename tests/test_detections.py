import dataclasses
import warnings
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY_CONFIG, annotation, detect_dataset, tiny_detector, write_coco

from detr_jax.data import features
from detr_jax.data.coco import CocoDataset
from detr_jax.data.features import backbone_features
from detr_jax.data.image_list import preprocess_images
from detr_jax.detection import detect_each
from detr_jax.errors import InputError
from detr_jax.evaluation.padding import padding_effect
from detr_jax.evaluation.runs import coco_results, detect, measure_dataset, predictions
from detr_jax.models import Selection
from detr_jax.models.detections import Detections
from detr_jax.plan import Plan
from detr_jax.sparse import SparseDETR

SIZES = [(20, 30), (30, 20), (20, 30), (20, 29)]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FirstGroups:
    """Keeps the groups whose index is below a threshold."""

    threshold: jax.Array

    def __call__(self, ffn, x, tokens):
        return Selection(active=jnp.broadcast_to(jnp.arange(4) < self.threshold, (*x.shape[:-1], 4)))


@pytest.fixture(scope="module")
def model():
    return tiny_detector()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    annotations = [annotation(1, 1, (1, 2, 10, 12)), annotation(2, 3, (5, 5, 8, 9), category_id=2)]
    return CocoDataset(write_coco(tmp_path_factory.mktemp("coco"), SIZES, annotations), "val2017")


def by_image(results):
    return {i: [r for r in results if r["image_id"] == i] for i in {r["image_id"] for r in results}}


def test_every_image_gets_a_result_for_every_query(model, dataset):
    results = by_image(detect_dataset(model, dataset, 2))
    assert sorted(results) == dataset.image_ids()
    assert all(len(r) == TINY_CONFIG.queries for r in results.values())


def test_the_batch_size_does_not_matter(model, dataset):
    one, two = (by_image(detect_dataset(model, dataset, size)) for size in (1, 2))
    for image_id, results in one.items():
        for a, b in zip(results, two[image_id], strict=True):
            assert a["category_id"] == b["category_id"]
            np.testing.assert_allclose(a["score"], b["score"], atol=1e-5)
            np.testing.assert_allclose(a["bbox"], b["bbox"], atol=1e-3)


def test_it_compiles_once_per_shape(model, dataset):
    features._embed.clear_cache()
    detect.clear_cache()
    shapes = {batch.pixel_mask.shape for batch, *_ in predictions(model, dataset, 2, progress=False)}
    # The shapes are each other's transposes: to the transformer, they are the same.
    compiled = features._embed._cache_size(), detect._cache_size()
    assert (len(shapes), *compiled) == (2, 2, 1)
    detect_dataset(tiny_detector(1), dataset, 2)  # other weights
    assert (features._embed._cache_size(), detect._cache_size()) == compiled


def test_new_thresholds_do_not_compile_again(model, dataset):
    def results(threshold):
        selectors = {"encoder.0": FirstGroups(jnp.array(threshold))}
        return detect_dataset(model, dataset, 2, selectors=selectors)

    dense, everything = detect_dataset(model, dataset, 2), results(4)
    compiled = detect._cache_size()
    half = results(2)
    assert detect._cache_size() == compiled
    np.testing.assert_allclose([r["score"] for r in everything], [r["score"] for r in dense], atol=1e-6)
    assert max(abs(a["score"] - b["score"]) for a, b in zip(half, dense, strict=True)) > 1e-6


def test_measuring_detects_the_same_and_counts_every_image_once(model, dataset):
    selectors = {"encoder.0": FirstGroups(jnp.array(2))}
    embedded = list(backbone_features(model, dataset, 2, ""))
    assert sum(batch.valid.sum() for batch in embedded) == len(SIZES) < 2 * len(embedded)  # a copy fills a batch
    measured = measure_dataset(model, embedded, selectors=selectors, group_size=8)
    results = detect_dataset(model, dataset, 2, selectors=selectors)
    for one, other in zip(measured.results, results, strict=True):
        assert (one["image_id"], one["category_id"]) == (other["image_id"], other["category_id"])
        np.testing.assert_allclose(one["bbox"], other["bbox"], atol=1e-3)
        np.testing.assert_allclose(one["score"], other["score"], atol=1e-5)
    assert tuple(measured.counts) == TINY_CONFIG.ffn_names
    encoder, decoder = measured.counts.values()
    assert decoder.neurons == len(SIZES) * TINY_CONFIG.queries * TINY_CONFIG.encoder_ffn_dim
    assert decoder.group_sparsity == 0 and encoder.group_sparsity == 0.5


def test_boxes_become_width_and_height_and_copies_are_left_out(dataset):
    batch = next(b for b, *_ in predictions(tiny_detector(), dataset, 2, progress=False) if not b.valid.all())
    boxes = np.array([[[1, 2, 4, 8]]] * 2, np.float32)
    found = Detections(np.full((2, 1), 0.5, np.float32), np.ones((2, 1), np.int32), boxes)
    (result,) = coco_results(batch, found)
    assert result == {"image_id": batch.image_ids[0], "category_id": 1, "bbox": [1, 2, 3, 6], "score": 0.5}


def test_scores_that_are_not_finite_are_named(dataset):
    model = tiny_detector()
    model.class_head.bias[...] = jnp.full(4, jnp.nan)
    with pytest.raises(ValueError, match=r"scores for images \[1, 3\] are not finite"):
        detect_dataset(model, dataset, 2)


def test_padding_changes_little(model, dataset):
    report = padding_effect(model, dataset, 2)
    assert report["images"] == len(SIZES)
    assert 0 < report["change"]["boxes"]["max"] < 0.1
    assert report["change"]["boxes"]["median"] < report["change"]["boxes"]["max"]
    assert set(report["AP"]) == {"padded", "exact"}


def test_boxes_are_clipped_to_the_image_where_people_see_them(dataset):
    model = tiny_detector()
    model.box_head.layers[2].bias[...] = jnp.array([-1.0, 1.0, 3.0, 3.0])  # large, off the middle
    found = dict(detect_each(model, dataset, 0.0))
    raw = by_image(detect_dataset(model, dataset, 1))
    outside = 0
    for image_id, detected in found.items():
        height, width = dataset.image_sizes()[dataset.image_ids().index(image_id)]
        assert (detected.boxes >= 0).all() and (detected.boxes <= np.array([width, height] * 2)).all()
        outside += sum(min(r["bbox"][:2]) < 0 for r in raw[image_id])
    assert outside > 0  # AP is of what the official post-processing returns


def test_a_plan_far_from_its_calibration_is_noticed(model, dataset):
    selectors = {"encoder.0": FirstGroups(jnp.array(2))}  # half of one FFN of two
    plan = Plan("toy", "", selectors, {}, {}, {"mean_group_sparsity": 0.25}, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SparseDETR(model, plan).detect(dataset[0].image)
    far = SparseDETR(model, dataclasses.replace(plan, measured={"mean_group_sparsity": 0.75}))
    with pytest.warns(UserWarning, match=r"keeps 75\.0% of the hidden neurons on images, for 25\.0% on"):
        far.detect(dataset[0].image)


def test_an_image_that_is_too_elongated_is_named(model, tmp_path):
    dataset = CocoDataset(write_coco(tmp_path, [(20, 30), (4, 3000)], []), "val2017")
    with pytest.raises(InputError, match=r"000000000002\.png: an image of 3000x4 pixels is too elongated"):
        detect_dataset(model, dataset, 1)
    with pytest.raises(InputError, match=r"image 1: an image of 3000x4 pixels is too elongated"):
        preprocess_images(
            [np.zeros((20, 30, 3), np.uint8), np.zeros((4, 3000, 3), np.uint8)], TINY_CONFIG.preprocessing
        )
