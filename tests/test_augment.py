import dataclasses

import numpy as np
import pytest
from tiny import TINY_CONFIG, annotation, tiny_detector, write_coco

from detr_jax import preset_config
from detr_jax.data.augment import AugmentedBatches, View, layout_views, padded_sides, random_view
from detr_jax.data.coco import CocoDataset
from detr_jax.data.dataset import Example
from detr_jax.data.transforms import preprocess
from detr_jax.models import Preprocessing

OFFICIAL = preset_config("detr-r50").preprocessing
SIZES = np.array([(480, 640), (640, 480), (427, 640), (500, 500), (640, 360), (375, 1242), (1080, 1920)])


def views(size, count=300):
    rng = np.random.default_rng(0)
    return [random_view(size, OFFICIAL, rng) for _ in range(count)]


def test_views_are_drawn_as_officially():
    """480 to 800 pixels under 1333, half of them mirrored, half parts of 384 to 600 pixels at 400, 500 or 600."""
    drawn = views((480, 640))
    whole = [view for view in drawn if view.box == (0, 0, 640, 480)]
    parts = [view for view in drawn if view.box != (0, 0, 640, 480)]
    assert 110 < len(parts) < 190 and 110 < sum(view.flipped for view in drawn) < 190
    assert {view.size for view in whole} == {(s, int(s * 640 / 480)) for s in range(480, 801, 32)}
    for view in parts:
        x0, y0, x1, y1 = view.box
        assert 0 <= x0 < x1 <= 640 and 0 <= y0 < y1 <= 480
        scaled = [(y1 - y0) * short / 480 for short in (400, 500, 600)]
        assert any(383.9 <= height <= 600.1 for height in scaled)
        assert 480 <= min(view.size) <= 800
        assert max(view.size) / min(view.size) == pytest.approx(max(x1 - x0, y1 - y0) / min(x1 - x0, y1 - y0), abs=0.01)


@pytest.mark.parametrize(("kind", "flips"), [("mirrored", {False, True}), ("whole", {False})])
def test_views_of_whole_images_have_the_size_that_they_are_evaluated_with(kind, flips):
    rng = np.random.default_rng(0)
    drawn = {random_view((480, 640), OFFICIAL, rng, kind) for _ in range(50)}
    assert drawn == {View((0.0, 0.0, 640.0, 480.0), (800, 1066), flipped) for flipped in flips}


def test_a_view_of_the_whole_image_is_what_the_detector_is_evaluated_with():
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    for preprocessing in (Preprocessing(32, 64), Preprocessing(33, 64, resize="transformers", resample="bicubic")):
        view = View((0.0, 0.0, 64.0, 48.0), preprocessing.resized_size((48, 64)), False)
        as_evaluated = preprocess(image, preprocessing)
        np.testing.assert_array_equal(view.preprocess(image, preprocessing), as_evaluated)
        mirrored = dataclasses.replace(view, flipped=True)
        np.testing.assert_array_equal(mirrored.preprocess(image, preprocessing), as_evaluated[:, ::-1])


def test_boxes_move_with_the_pixels():
    image = np.zeros((40, 60, 3), np.uint8)
    image[10:20, 30:45] = 255
    boxes = np.array([[30, 10, 45, 20], [0, 0, 19, 39], [12, 4, 28, 16]], np.float32)
    example = Example(1, image, boxes, np.array([1, 2, 3], np.int32))
    for flipped in (False, True):
        view = View((20.0, 5.0, 60.0, 35.0), (60, 80), flipped)
        labels, found = view.objects(example)
        assert labels.tolist() == [1, 3], "the second is outside"
        plain = Preprocessing(mean=(0, 0, 0), std=(1, 1, 1))
        rows, columns = np.nonzero(view.preprocess(image, plain)[..., 0] > 0.5)
        seen = [columns.min() / 80, rows.min() / 60, (columns.max() + 1) / 80, (rows.max() + 1) / 60]
        low, high = found[0, :2] - found[0, 2:] / 2, found[0, :2] + found[0, 2:] / 2
        np.testing.assert_allclose([*low, *high], seen, atol=1e-6)
        np.testing.assert_allclose(found[1, 2:], (8 / 40, 11 / 30), atol=1e-6), "the third is cut"


@pytest.mark.parametrize("preprocessing", [OFFICIAL, preset_config("detr-tiny").preprocessing])
def test_every_image_is_in_a_few_shapes_that_memory_is_bounded_for(preprocessing):
    rng = np.random.default_rng(1)
    sizes = SIZES[rng.integers(0, len(SIZES), 203)]
    sides = padded_sides(preprocessing)
    shapes = set()
    for epoch in range(5):
        layouts = layout_views(sizes, preprocessing, 4, 0, epoch)
        assert len(layouts) == 50
        indices = [index for layout in layouts for index in layout.indices]
        assert len(set(indices)) == 200
        for layout in layouts:
            assert all(view.size[0] <= layout.shape[0] and view.size[1] <= layout.shape[1] for view in layout.views)
        shapes |= {layout.shape for layout in layouts}
    assert {side for shape in shapes for side in shape} <= set(sides)
    assert len(shapes) == 5 and all(min(shape) == sides[0] for shape in shapes)


def test_small_views_get_no_smaller_and_large_ones_fit():
    view = View((0.0, 0.0, 300.0, 400.0), (1066, 800), False)
    assert view.within((1088, 800)) == view
    assert view.within((800, 1344)).size == (800, 600)


@pytest.fixture
def data(tmp_path):
    boxes = [annotation(i, 1 + i % 5, (2 * i, i, 10, 12), category_id=1 + i % 2, iscrowd=int(i == 7)) for i in range(8)]
    return CocoDataset(write_coco(tmp_path, [(32, 40), (60, 32)] * 3, boxes), "val2017")


def test_batches_are_those_of_their_epoch_from_any_position_on(data):
    model = tiny_detector()
    batches = AugmentedBatches(model, data, 2, seed=3)
    whole = list(batches.batches(1))
    assert len(whole) == len(batches) == 3
    (last,) = batches.batches(1, 2)
    for name in ("pixel_values", "pixel_mask"):
        np.testing.assert_array_equal(getattr(last, name), getattr(whole[2], name))
    others = list(batches.batches(2))
    assert not all(
        np.array_equal(one.pixel_values, other.pixel_values) for one, other in zip(whole, others, strict=True)
    )
    for batch in whole:
        assert batch.targets.valid.shape == (2, 2), "one crowd, at most two other objects in an image"
        assert not batch.pixel_values[~batch.pixel_mask].any()


@pytest.mark.parametrize(
    ("changes", "batch_size", "message"),
    [
        ({"queries": 1}, 2, r"000000000001\.png has 2 objects, but the detector has only 1 object queries"),
        ({}, 7, "val2017 has 6 images, too few for a batch of 7"),
        (
            {"preprocessing": Preprocessing(resize="stretch", box=(32, 32))},
            2,
            "this detector's images are resized by 'stretch': pass --size SHORTER LONGER",
        ),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(data, changes, batch_size, message):
    model = tiny_detector(config=dataclasses.replace(TINY_CONFIG, **changes))
    with pytest.raises(ValueError, match=message):
        AugmentedBatches(model, data, batch_size, 0)
