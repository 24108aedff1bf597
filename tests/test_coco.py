import json

import numpy as np
import pytest
from PIL import Image
from tiny import annotation, write_coco

from detr_jax.data.coco import CocoDataset
from detr_jax.data.registry import open_dataset

SIZES = [(20, 30), (30, 20), (16, 16)]


@pytest.fixture
def root(tmp_path):
    annotations = [
        annotation(7, 1, (2, 3, 10, 5), category_id=2),
        annotation(8, 1, (0, 0, 30, 20), iscrowd=1),
        annotation(9, 2, (-5, 10, 10, 40)),
        annotation(10, 2, (4, 4, 0, 6)),
        annotation(11, 2, (25, 4, 5, 6)),
    ]
    return write_coco(tmp_path / "coco", SIZES, annotations)


def edit(root, change):
    path = root / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_examples_are_the_official_training_targets(root):
    dataset = CocoDataset(root, "val2017")
    assert (len(dataset), dataset.name, dataset.image_ids()) == (3, "val2017", [1, 2, 3])
    np.testing.assert_array_equal(dataset.image_sizes(), SIZES)

    first, second, third = dataset[0], dataset[1], dataset[2]
    assert (first.image_id, first.image.shape) == (1, (20, 30, 3))
    np.testing.assert_array_equal(first.boxes, [[2, 3, 12, 8]])  # without the crowd
    np.testing.assert_array_equal(first.labels, [2])
    np.testing.assert_array_equal(second.boxes, [[0, 10, 5, 30]])  # clipped; empty ones dropped
    assert third.boxes.shape == (0, 4)  # kept without objects
    assert (third.boxes.dtype, third.labels.dtype) == (np.float32, np.int32)


def test_the_ground_truth_keeps_what_training_drops(root):
    truth = CocoDataset(root, "val2017").ground_truth()
    assert [a["id"] for a in truth["annotations"]] == [7, 8, 9, 10, 11]
    assert [i["id"] for i in truth["images"]] == [1, 2, 3]


def test_images_come_in_the_order_of_their_ids(root):
    edit(root, lambda content: content["images"].reverse())
    dataset = CocoDataset(root, "val2017", images=2)
    assert dataset.image_ids() == [1, 2]
    assert len(dataset.ground_truth()["images"]) == 2
    assert dataset[1].image_id == 2


def test_only_the_images_in_use_need_to_exist(root):
    (root / "val2017/000000000003.png").unlink()
    assert len(CocoDataset(root, "val2017", images=2)) == 2
    with pytest.raises(FileNotFoundError, match=r"1 of the 3 images .* the first is 000000000003\.png"):
        CocoDataset(root, "val2017")


@pytest.mark.parametrize("images", [0, -1, 4])
def test_more_images_than_there_are_is_an_error(root, images):
    with pytest.raises(ValueError, match=f"has 3 images, asked for {images}"):
        CocoDataset(root, "val2017", images=images)


def test_missing_folders_and_files_are_named(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*train2017"):
        CocoDataset(root, "train2017")
    (root / "annotations/instances_val2017.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no annotation file .*instances_val2017\.json"):
        CocoDataset(root, "val2017")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), "has no list 'images'"),
        (lambda c: c.pop("categories"), "has no list 'categories'"),
        (lambda c: c.update(annotations={}), "has no list 'annotations'"),
        (lambda c: c.update(images=[]), "has no images"),
        (lambda c: c["annotations"][0].pop("bbox"), "an entry of 'annotations' has no 'bbox'"),
        (lambda c: c["annotations"].append(3), "an entry of 'annotations' is not an object"),
        (lambda c: c["images"][0].pop("height"), "an entry of 'images' has no 'height'"),
        (lambda c: c["images"][0].update(height=None), "needs whole numbers: an id from 0, a height and width from 1"),
        (lambda c: c["images"][1].update(id=1), "two images have the same id"),
        (lambda c: c["annotations"][0].update(image_id=99), "annotation 7 belongs to image 99"),
        (lambda c: c["annotations"][0].update(category_id=99), "annotation 7 is of category 99"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"annotation 7 has bbox \[1, 2, 3\]"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, float("nan")]), "annotation 7 has bbox"),
        (lambda c: c["annotations"][0].update(bbox="1234"), "annotation 7 has bbox 1234"),
        (lambda c: c["annotations"][0].update(area=None), "annotation 7 has area None"),
        (lambda c: c["annotations"][0].update(iscrowd=None), "annotation 7 has iscrowd None"),
        (lambda c: c["images"][1].update(file_name=2), "the image 2 has file_name 2, not a text"),
    ],
)
def test_faults_of_the_annotation_file_are_named(root, change, message):
    edit(root, change)
    with pytest.raises(ValueError, match=rf"instances_val2017\.json.*{message}"):
        CocoDataset(root, "val2017")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x80"])
def test_broken_json_is_named(root, text):
    (root / "annotations/instances_val2017.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"instances_val2017\.json (is not valid JSON|holds a list)"):
        CocoDataset(root, "val2017")


def test_a_file_of_another_size_than_annotated_is_named(root):
    Image.new("RGB", (5, 6)).save(root / "val2017/000000000001.png")
    with pytest.raises(ValueError, match=r"000000000001\.png is 5x6 pixels, its annotation says 30x20"):
        CocoDataset(root, "val2017")[0]


def test_sources(root):
    assert open_dataset(root, "val", images=1).image_ids() == [1]
    assert open_dataset(root, "val2017").name == "val2017"
    assert len(open_dataset(None, "val", images=4)) == 4
