import contextlib
import copy
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny import annotation

from detr_jax.data.scenes import ScenesDataset
from detr_jax.errors import InputError
from detr_jax.evaluation.coco_ap import (
    METRICS,
    bootstrap,
    bootstrap_difference,
    category_ap,
    confidence_interval,
    require_usable_ap,
    score,
)


def truth(images, annotations):
    return {
        "images": [{"id": i, "height": 100, "width": 100} for i in images],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def result(image_id, bbox, score, category_id=1):
    return {"image_id": image_id, "category_id": category_id, "bbox": list(bbox), "score": score}


def noisy_results(ground_truth, seed, digits=16):
    """Detections of most objects, some displaced, some of the wrong class, and some of nothing."""
    rng = np.random.default_rng(seed)
    results = []
    for a in ground_truth["annotations"]:
        if rng.uniform() < 0.8:
            box = np.array(a["bbox"]) + rng.normal(0, 3, 4)
            category = a["category_id"] if rng.uniform() < 0.8 else int(rng.integers(1, 9))
            results.append(result(a["image_id"], box.tolist(), round(rng.uniform(), digits), category))
            results.append(result(a["image_id"], (box + 40).tolist(), round(rng.uniform(), digits), category))
    return results


@pytest.fixture(scope="module")
def scenes():
    dataset = ScenesDataset("val", images=40)
    ground_truth = dataset.ground_truth()
    ground_truth["annotations"][3]["iscrowd"] = 1
    return ground_truth, dataset.image_ids()


def test_perfect_detections(scenes):
    ground_truth, image_ids = scenes
    results = [result(a["image_id"], a["bbox"], 0.9, a["category_id"]) for a in ground_truth["annotations"]]
    before = copy.deepcopy(ground_truth)
    scores = score(ground_truth, results, image_ids)
    assert ground_truth == before
    assert scores.numbers["AP"] == pytest.approx(1)
    assert set(scores.numbers) == set(METRICS)
    assert list(scores.category_ap.values()) == pytest.approx([1] * 8)
    assert confidence_interval(bootstrap(scores, 20)) == (pytest.approx(1), pytest.approx(1))


def test_a_case_computed_by_hand():
    annotations = [annotation(1, 1, (0, 0, 10, 10)), annotation(2, 2, (0, 0, 10, 10))]
    results = [
        result(1, (0, 0, 10, 10), 0.9),  # IoU 1
        result(2, (50, 50, 10, 10), 0.8),  # a miss
        result(2, (0, 0, 10, 8), 0.7),  # IoU 0.8: a hit up to that threshold
    ]
    # Precision 1 up to recall .5 (51 of 101 points), then 2/3 for IoU thresholds .5 to .8 and 0 above.
    found = (51 + 50 * 2 / 3) / 101
    scores = score(truth([1, 2], annotations), results, [1, 2])
    assert scores.numbers["AP50"] == scores.numbers["AP75"] == pytest.approx(found)
    assert scores.numbers["AP"] == pytest.approx((7 * found + 3 * 51 / 101) / 10)
    assert scores.numbers["AR100"] == pytest.approx((7 * 1 + 3 * 0.5) / 10)
    assert np.isnan(scores.numbers["APl"])  # no large objects
    assert scores.category_ap == {"cat": pytest.approx(scores.numbers["AP"])}


def test_an_annotation_with_id_zero_counts():
    scores = score(truth([1], [annotation(0, 1, (0, 0, 10, 10))]), [result(1, (0, 0, 10, 10), 0.9)], [1])
    assert scores.numbers["AP"] == pytest.approx(1)


def test_images_without_objects_count():
    annotations = [annotation(1, 1, (0, 0, 10, 10))]
    results = [result(2, (0, 0, 10, 10), 0.9), result(1, (0, 0, 10, 10), 0.8)]
    assert score(truth([1, 2], annotations), results, [1, 2]).numbers["AP"] == pytest.approx(0.5)
    assert score(truth([1, 2], annotations), results, [1]).numbers["AP"] == pytest.approx(1)


def test_nothing_detected():
    scores = score(truth([1, 2], [annotation(1, 1, (0, 0, 10, 10))]), [], [1, 2])
    assert scores.numbers["AP"] == 0
    samples = bootstrap(scores, 50)
    assert np.isnan(samples).any()  # draws without the only object
    assert confidence_interval(samples) == (0, 0)


def test_nothing_to_detect():
    scores = score(truth([1], []), [result(1, (0, 0, 10, 10), 0.9)], [1])
    assert np.isnan(list(scores.numbers.values())).all()
    assert scores.category_ap == {}
    assert np.isnan(confidence_interval(bootstrap(scores, 5))).all()
    with pytest.raises(InputError, match="AP is undefined on these images"):
        require_usable_ap(scores)


def test_data_without_categories_have_no_ap():
    scores = score(truth([1, 2], []) | {"categories": []}, [result(1, (0, 0, 10, 10), 0.9)], [1, 2])
    assert np.isnan(list(scores.numbers.values())).all()


def test_categories_of_one_name_stay_apart(scenes):
    ground_truth, image_ids = scenes
    results = noisy_results(ground_truth, 0)
    renamed = copy.deepcopy(ground_truth)
    for category in renamed["categories"][1:7]:
        category["name"] = "shape"
    right, found = (score(truth, results, image_ids) for truth in (ground_truth, renamed))
    assert list(found.category_ap.values()) == list(right.category_ap.values())
    assert list(found.category_ap)[:3] == ["circle", "shape (2)", "shape (3)"]
    assert found.numbers["AP"] == pytest.approx(np.mean(list(found.category_ap.values())), abs=1e-12)
    np.testing.assert_array_equal(bootstrap(found, 20), bootstrap(right, 20))


def test_a_budget_in_ap_needs_a_usable_one(scenes):
    ground_truth, image_ids = scenes
    assert require_usable_ap(score(ground_truth, noisy_results(ground_truth, 0), image_ids)) > 0.1
    with pytest.raises(InputError, match=r"an AP of 0\.000 .* do its classes belong to the data's categories"):
        require_usable_ap(score(ground_truth, [], image_ids))


def test_only_a_crowd():
    annotations = [annotation(1, 1, (0, 0, 50, 50), iscrowd=1), annotation(2, 1, (60, 60, 10, 10))]
    results = [result(1, (0, 0, 20, 20), 0.9), result(1, (60, 60, 10, 10), 0.8)]
    scores = score(truth([1], annotations), results, [1])
    assert scores.numbers["AP"] == pytest.approx(1)  # what lies in a crowd is no mistake
    assert scores.category_ap["cat"] == pytest.approx(1)


def test_our_ap_of_every_image_once_is_that_of_pycocotools(scenes):
    scores = score(scenes[0], noisy_results(scenes[0], 0, digits=1), scenes[1])  # with ties
    assert 0.1 < scores.numbers["AP"] < 0.9
    assert np.mean(list(scores.category_ap.values())) == pytest.approx(scores.numbers["AP"], abs=1e-12)


def test_our_ap_of_repeated_images_is_that_of_pycocotools(scenes):
    ground_truth, image_ids = scenes
    results = noisy_results(ground_truth, 1)
    scores = score(ground_truth, results, image_ids)
    for seed in range(3):
        weights = np.random.default_rng(seed).multinomial(len(image_ids), np.full(len(image_ids), 1 / len(image_ids)))
        repeated = {"images": [], "annotations": [], "categories": ground_truth["categories"]}
        detected = []
        for image_id, times in zip(image_ids, weights, strict=True):
            for _ in range(times):
                new_id = len(repeated["images"])
                repeated["images"].append({"id": new_id})
                for a in ground_truth["annotations"]:
                    if a["image_id"] == image_id:
                        new = {"id": len(repeated["annotations"]) + 1, "image_id": new_id}
                        repeated["annotations"].append({**a, **new})
                detected += [{**r, "image_id": new_id} for r in results if r["image_id"] == image_id]
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = repeated
            coco.createIndex()
            evaluation = COCOeval(coco, coco.loadRes(detected), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        ours = np.nanmean([category_ap(m, weights) for m in scores.matches])
        assert ours == pytest.approx(evaluation.stats[0], abs=1e-12)


def test_the_bootstrap_is_seeded_and_surrounds_the_ap(scenes):
    scores = score(scenes[0], noisy_results(scenes[0], 0), scenes[1])
    samples = bootstrap(scores, 100, seed=5)
    np.testing.assert_array_equal(samples, bootstrap(scores, 100, seed=5))
    assert (samples != bootstrap(scores, 100, seed=6)).any()
    low, high = confidence_interval(samples)
    assert low < scores.numbers["AP"] < high
    assert 0.02 < high - low < 0.3
    with pytest.raises(ValueError, match="at least one replicate, not 0"):
        bootstrap(scores, 0)


def test_paired_differences_are_narrower(scenes):
    ground_truth, image_ids = scenes
    results = noisy_results(ground_truth, 0)
    a, b = score(ground_truth, results, image_ids), score(ground_truth, results[:-4], image_ids)
    low, high = confidence_interval(bootstrap_difference(a, b, 100))
    assert low <= a.numbers["AP"] - b.numbers["AP"] <= high
    alone = confidence_interval(bootstrap(a, 100))
    assert high - low < 0.5 * (alone[1] - alone[0])
    np.testing.assert_array_equal(bootstrap_difference(a, a, 10), 0)
    with pytest.raises(ValueError, match="same images: 40 and 39 were given, 39 of them common"):
        bootstrap_difference(a, score(ground_truth, results, image_ids[:-1]))


def test_faults_are_named():
    with pytest.raises(ValueError, match="no images to evaluate"):
        score(truth([1], []), [], [])
    with pytest.raises(ValueError, match="results for image 5"):
        score(truth([1], []), [result(5, (0, 0, 1, 1), 0.5)], [1])


def test_pycocotools_is_silent(capsys):
    score(truth([1], []), [], [1])
    assert capsys.readouterr().out == ""
