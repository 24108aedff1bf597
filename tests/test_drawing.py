import numpy as np
import pytest

from detr_jax.models.detections import ImageDetections
from detr_jax.models.labels import COCO_LABELS
from detr_jax.viz.boxes import MIN_SIDE, colour, draw_detections


def test_classes_have_distinct_colours():
    colours = np.array([colour(i) for i in range(len(COCO_LABELS))])
    distances = np.abs(colours[:, None] - colours[None]).sum(-1)
    assert distances[~np.eye(len(colours), dtype=bool)].min() > 0


@pytest.mark.parametrize("size", [(8, 8), (128, 128), (2000, 300), (30, 3000)])
def test_boxes_are_drawn_at_any_image_size(size):
    height, width = size
    boxes = np.array([[0.1 * width, 0.2 * height, 0.9 * width, 0.8 * height], [-9, -9, width + 9, height + 9]])
    labels = np.array([1, 12])
    names = tuple(COCO_LABELS[label] for label in labels)
    found = ImageDetections(boxes.astype(np.float32), labels, names, np.array([0.95, 0.5]))
    picture = draw_detections(np.zeros((*size, 3), np.uint8), found)
    assert max(picture.size) == max(MIN_SIDE, *size)
    pixels = np.asarray(picture)
    scale = picture.width / width
    assert tuple(pixels[picture.height // 2, round(0.1 * width * scale)]) == colour(1)
    for label in (1, 12):
        assert (pixels == colour(label)).all(-1).any()


def test_nothing_found_leaves_the_image_alone():
    image = np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8)
    nothing = ImageDetections(np.zeros((0, 4)), np.zeros(0, int), (), np.zeros(0))
    np.testing.assert_array_equal(draw_detections(image, nothing), image)
