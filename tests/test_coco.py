import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import annotation, write_coco

from detr_jax.commands.options import DataOptions
from detr_jax.data import registry
from detr_jax.data.coco import CocoDataset
from detr_jax.data.registry import open_dataset, register_dataset
from detr_jax.data.scenes import ScenesDataset
from detr_jax.errors import InputError
from detr_jax.evaluation.coco_ap import score

pytestmark = pytest.mark.filterwarnings("ignore:.*boxes outside their images")  # the fixture has one

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


def test_annotations_without_what_can_be_assumed_are_completed(root):
    def drop(content):
        for a in content["annotations"]:
            a.pop("iscrowd")
        content["annotations"][2].pop("area")
        content["annotations"][2]["bbox"] = [14.5, 4.5, 7.5, 10.5]

    edit(root, drop)
    said = (
        r"instances_val2017\.json: no area in 1 of the 5 annotations, taken to be that of the box; "
        "no iscrowd in 5 of the 5 annotations, taken to be 0$"
    )
    with pytest.warns(UserWarning, match=said):
        dataset = CocoDataset(root, "val2017")
    truth = dataset.ground_truth()["annotations"]
    assert [a["iscrowd"] for a in truth] == [0] * 5
    assert (truth[2]["area"], truth[2]["bbox"]) == (7.5 * 10.5, [14.5, 4.5, 7.5, 10.5])  # as annotated
    np.testing.assert_array_equal(dataset[1].boxes, [[14.5, 4.5, 20, 15]])  # in the image
    np.testing.assert_array_equal(dataset[0].boxes, [[2, 3, 12, 8], [0, 0, 30, 20]])
    found = [a | {"score": 0.9} for a in truth if a["bbox"][2]]
    assert score(dataset.ground_truth(), found, dataset.image_ids()).numbers["AR100"] > 0.8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), "has no list 'images'"),
        (lambda c: c.pop("categories"), "has no list 'categories'"),
        (lambda c: c.update(annotations={}), "has no list 'annotations'"),
        (lambda c: c.update(images=[]), "has no images"),
        (lambda c: c["annotations"][0].pop("bbox"), "entry 0 of 'annotations' has no 'bbox'"),
        (lambda c: c["annotations"].append(3), "entry 5 of 'annotations' is 3, not an object"),
        (lambda c: c["images"][0].pop("height"), "entry 0 of 'images' has no 'height'"),
        (
            lambda c: c["images"][0].update(height=None),
            r"entry 0 of 'images' \(id 1\) has the height None, not a whole number from 1",
        ),
        (lambda c: c["images"][1].update(id=1), "two images have the id 1"),
        (lambda c: c["categories"][1].update(id=1), "two categories have the id 1"),
        (lambda c: c["images"][0].update(id="1"), "entry 0 of 'images' .* has the id '1', not a whole number"),
        (lambda c: c["categories"][1].update(id="2"), "entry 1 of 'categories' .* has the id '2', not a whole number"),
        (lambda c: c["categories"][1].pop("id"), "entry 1 of 'categories' has no 'id'"),
        (lambda c: c["categories"][1].update(name=2), r"entry 1 of 'categories' \(id 2\) has the name 2, not a text"),
        (lambda c: c["annotations"][1].update(category_id="2"), "entry 1 of 'annotations' .* has the category_id '2'"),
        (
            lambda c: c["annotations"][1].update(category_id=[2]),
            r"entry 1 of 'annotations' .* has the category_id \[2\]",
        ),
        (lambda c: c["annotations"][1].update(category_id="dog"), "has the category_id 'dog', not a whole number"),
        (lambda c: c["annotations"][1].update(category_id=True), "has the category_id True, not a whole number"),
        (lambda c: c["annotations"][1].update(image_id="2"), "entry 1 of 'annotations' .* has the image_id '2'"),
        (
            lambda c: c["annotations"][0].update(image_id=99),
            r"\(id 7\) has the image_id 99, which none of the images has",
        ),
        (
            lambda c: c["annotations"][0].update(category_id=99),
            r"\(id 7\) has the category_id 99, which none of the categories has",
        ),
        (
            lambda c: c["annotations"][0].update(bbox=[1, 2, 3]),
            r"\(id 7\) has the bbox \[1, 2, 3\], not four finite numbers",
        ),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, float("nan")]), r"\(id 7\) has the bbox"),
        (lambda c: c["annotations"][0].update(bbox="1234"), r"\(id 7\) has the bbox '1234'"),
        (lambda c: c["annotations"][0].update(area=None), r"\(id 7\) has the area None, not a finite number"),
        (lambda c: c["annotations"][0].update(iscrowd=None), r"\(id 7\) has the iscrowd None, not 0 or 1"),
        (lambda c: c["images"][1].update(file_name=2), r"\(id 2\) has the file_name 2, not a text"),
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


def rotate(root, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = root / "val2017/000000000001.png"
    Image.open(path).save(path, exif=exif)


def test_the_rotation_of_a_photograph_is_named(root):
    rotate(root, 6)
    dataset = CocoDataset(root, "val2017")
    with pytest.warns(UserWarning, match=r"000000000001\.png has the EXIF orientation 6; its boxes are taken"):
        assert dataset[0].image.shape == (20, 30, 3)  # as stored
    edit(root, lambda content: content["images"][0].update(height=30, width=20))
    with pytest.raises(InputError, match="its annotation says 20x30, the size in which it is displayed: its EXIF"):
        CocoDataset(root, "val2017")[0]


def test_boxes_outside_their_images_are_reported(root):
    edit(root, lambda content: content["annotations"][0].update(bbox=[2, 21, 5, 8]))
    with pytest.warns(UserWarning, match=r"boxes outside their images: 2, the first of annotation 7\. .* EXIF"):
        CocoDataset(root, "val2017")


def test_data_without_objects_are_known_to_be(root):
    assert open_dataset(f"coco:{root}", "val").has_annotations
    assert not open_dataset(f"coco:{root}", "val", 2).ground_truth()["images"][2:]
    edit(root, lambda content: content.update(annotations=[]))
    assert not open_dataset(f"coco:{root}", "val").has_annotations


def test_the_identity_of_a_data_set_is_not_its_path(root, tmp_path):
    before = CocoDataset(root, "val2017").fingerprint
    shutil.copytree(root, tmp_path / "copy")
    assert CocoDataset(tmp_path / "copy", "val2017").fingerprint == before
    assert CocoDataset(root, "val2017", images=2).fingerprint != before
    edit(root, lambda content: content["annotations"][0].update(bbox=[2, 3, 10, 6]))
    assert CocoDataset(root, "val2017").fingerprint != before
    assert (
        ScenesDataset("val").fingerprint == ScenesDataset("val", 600).fingerprint != ScenesDataset("val", 9).fingerprint
    )


def test_sources(root, tmp_path, monkeypatch):
    assert open_dataset(f"coco:{root}", "val", images=1).image_ids() == [1]
    assert open_dataset(f"coco:{root}", "val2017").name == "val2017"
    assert len(open_dataset("scenes", "val", images=4)) == 4
    monkeypatch.chdir(tmp_path)
    assert open_dataset("coco:coco", "val").image_name(1) == str(Path("coco/val2017/000000000002.png"))
    for data, message in (
        (str(root), r"known are scenes, coco, images.*for the folder .*coco say coco:.*coco or images:"),
        ("coco", "needs a path: coco:PATH"),
        ("scenes:here", "have no path"),
        ("voc:here", "there is no data set 'voc:here'"),
    ):
        with pytest.raises(InputError, match=message):
            open_dataset(data, "val")


def test_a_kind_of_data_set_from_outside(monkeypatch):
    monkeypatch.setattr(registry, "_OPENERS", registry._OPENERS.copy())
    register_dataset("toy", lambda location, split, images: ScenesDataset(split, int(location)))
    assert len(open_dataset("toy:3", "val")) == 3
    with pytest.raises(InputError, match="cannot be named 'toy'"):
        register_dataset("toy", lambda *_: None)


def test_the_options_of_commands_name_a_data_set(root):
    assert DataOptions().open("val", 3).name == "scenes-val"
    assert DataOptions(coco=root).open("val").name == DataOptions(f"coco:{root}").open("val").name == "val2017"
    with pytest.raises(InputError, match=r"--coco coco is short for --data coco:coco; --data images:here is given too"):
        DataOptions("images:here", Path("coco")).open("val")
