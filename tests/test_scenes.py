import numpy as np
import pytest

from detr_jax.data import scenes
from detr_jax.data.scenes import MIN_VISIBLE, SIDE, ScenesDataset, max_objects, render_scene
from detr_jax.evaluation.coco_ap import score
from detr_jax.models.labels import SCENES_LABELS

SAMPLE = 100


@pytest.fixture(scope="module")
def sample():
    return [render_scene("train", i) for i in range(SAMPLE)]


def test_a_scene_depends_on_split_and_index_only(sample):
    again = render_scene("train", 7)
    np.testing.assert_array_equal(again.image, sample[7].image)
    np.testing.assert_array_equal(again.boxes, sample[7].boxes)
    np.testing.assert_array_equal(again.labels, sample[7].labels)
    others = [render_scene(split, 7) for split in ("val", "test")]
    assert len({scene.image.tobytes() for scene in [*sample, *others]}) == SAMPLE + 2


def test_boxes_enclose_the_visible_pixels(sample):
    large = [render_scene("train", i, 256) for i in range(SAMPLE // 4)]
    for side, scene in [(SIDE, scene) for scene in sample] + [(256, scene) for scene in large]:
        assert scene.image.shape == (side, side, 3)
        assert scene.image.dtype == np.uint8
        assert 1 <= len(scene.labels) == len(scene.boxes) == len(scene.visible) <= max_objects(side)
        assert scene.visible.sum(0).max() == 1
        for (x0, y0, x1, y1), visible in zip(scene.boxes.astype(int), scene.visible, strict=True):
            assert visible[y0:y1, x0:x1].sum() == visible.sum()
            edges = (visible[y0], visible[y1 - 1], visible[:, x0], visible[:, x1 - 1])
            assert all(edge.any() for edge in edges)


def test_shapes_stay_visible(monkeypatch):
    stamps = []
    stamp = scenes._stamp
    monkeypatch.setattr(scenes, "_stamp", lambda *arguments: stamps.append(stamp(*arguments)) or stamps[-1])
    complete = 0
    for index in range(SAMPLE):
        stamps.clear()
        scene = render_scene("train", index)
        if len(scene.labels) < len(stamps):
            continue  # a shape found no place, so stamps and objects do not correspond
        complete += 1
        for drawn, visible in zip(stamps, scene.visible, strict=True):
            assert visible.sum() >= MIN_VISIBLE * (drawn > 0.5).sum()
    assert complete > SAMPLE / 2


def test_all_classes_and_counts_occur(sample):
    labels = np.concatenate([scene.labels for scene in sample])
    assert set(labels.tolist()) == set(range(1, len(SCENES_LABELS)))
    assert {len(scene.labels) for scene in sample} == set(range(1, max_objects(SIDE) + 1))


def test_objects_stand_out(sample):
    """The colour of every object differs from its surroundings, so that the task can be solved."""
    contrasts = [
        np.linalg.norm(scene.image[visible].mean(0) - scene.image[~scene.visible.any(0)].mean(0))
        for scene in sample
        for visible in scene.visible
    ]
    assert np.median(contrasts) > 60


def test_perfect_detections_of_the_ground_truth():
    dataset = ScenesDataset("val", images=40)
    truth = dataset.ground_truth()
    assert [image["id"] for image in truth["images"]] == dataset.image_ids() == list(range(40))
    assert [category["name"] for category in truth["categories"]] == list(SCENES_LABELS[1:])
    assert all(0 < a["area"] <= a["bbox"][2] * a["bbox"][3] for a in truth["annotations"])
    boxes = np.array([a["bbox"] for a in truth["annotations"]])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= SIDE).all()
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
        for a in truth["annotations"]
    ]
    assert score(truth, results, dataset.image_ids()).numbers["AP"] == pytest.approx(1)


def test_examples_are_the_scenes():
    dataset = ScenesDataset("train", images=3)
    assert len(dataset) == 3
    assert dataset.image_ids() == [0, 1, 2]
    np.testing.assert_array_equal(dataset.image_sizes(), [(SIDE, SIDE)] * 3)
    example, scene = dataset[2], render_scene("train", 2)
    assert example.image_id == 2
    np.testing.assert_array_equal(example.image, scene.image)
    np.testing.assert_array_equal(example.boxes, scene.boxes)
    np.testing.assert_array_equal(example.labels, scene.labels)


def test_large_scenes_have_more_and_larger_objects():
    dataset = ScenesDataset("val", images=SAMPLE // 2, side=256)
    np.testing.assert_array_equal(dataset.image_sizes(), [(256, 256)] * len(dataset))
    assert dataset.name == "scenes-256-val" and dataset.fingerprint != ScenesDataset("val", SAMPLE // 2).fingerprint
    truth = dataset.ground_truth()
    assert {(image["width"], image["height"]) for image in truth["images"]} == {(256, 256)}
    assert max(max(a["bbox"][2:]) for a in truth["annotations"]) > 128
    assert max(len(dataset[i].labels) for i in range(len(dataset))) > max_objects(SIDE)


@pytest.mark.parametrize("images", [0, -1, 2001])
def test_images_that_do_not_exist(images):
    with pytest.raises(ValueError, match="has 2000 images"):
        ScenesDataset("test", images=images)


def test_unknown_split_and_index():
    with pytest.raises(ValueError, match="train, val, test, not 'dev'"):
        ScenesDataset("dev")
    with pytest.raises(ValueError, match="no end of training scenes"):
        ScenesDataset("train")
    with pytest.raises(ValueError, match="sides of 128 or 256 pixels, not 64"):
        ScenesDataset("val", side=64)
    with pytest.raises(IndexError, match="no index 600"):
        ScenesDataset("val")[600]
    with pytest.raises(IndexError, match="no index -1"):
        ScenesDataset("val")[-1]
