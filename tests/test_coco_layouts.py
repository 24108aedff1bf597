"""Exports of Roboflow, CVAT and Label Studio as they come: layouts, names of splits, ids, and AP."""

import json
import shutil
import warnings

import exports
import numpy as np
import pytest
from commands import refusal, run

import detr_jax
from detr_jax.data.classes import with_classes
from detr_jax.data.coco_layouts import find_split
from detr_jax.data.scenes import ScenesDataset
from detr_jax.errors import InputError, MissingFileError
from detr_jax.models.labels import SCENES_LABELS

SCENES = ScenesDataset("val", 6)
GROUP = pytest.mark.filterwarnings("ignore:.*the category 'shapes' .0. is left out")
EXPORTS = {
    "Roboflow": (lambda root: exports.roboflow(root, train=SCENES, valid=SCENES, test=SCENES), "val"),
    "CVAT": (lambda root: exports.cvat(root, Train=SCENES, Validation=SCENES), "val"),
    "CVAT, one folder of images": (lambda root: exports.cvat(root, "images", train=SCENES, val=SCENES), "val"),
    "CVAT, no subsets": (lambda root: exports.cvat(root, default=SCENES), "all"),
    "Label Studio": (lambda root: exports.label_studio(root, SCENES), "all"),
    "Label Studio, for a split": (lambda root: exports.label_studio(root / "val", SCENES).parent, "val"),
    "CVAT, for a split": (lambda root: exports.cvat(root / "valid", default=SCENES).parent, "val"),
}


@GROUP
@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_holds_what_was_annotated(tmp_path, name):
    write, split = EXPORTS[name]
    dataset = detr_jax.open_dataset(f"coco:{write(tmp_path / 'export')}", split)
    matched, mapping = with_classes(dataset, SCENES_LABELS)
    assert not mapping.is_identity and not mapping.missing  # the ids are others, the names are the same
    assert len(matched) == len(SCENES)
    for index in range(len(SCENES)):
        one, scene = matched[index], SCENES[index]
        np.testing.assert_array_equal(one.image, scene.image)
        np.testing.assert_array_equal(one.boxes, scene.boxes)
        np.testing.assert_array_equal(one.labels, scene.labels)
    needed = ("bbox", "area", "iscrowd", "category_id")
    expected = [[a[key] for key in needed] for a in SCENES.ground_truth()["annotations"]]
    assert [[a[key] for key in needed] for a in matched.ground_truth()["annotations"]] == expected


def test_the_ap_of_an_export_is_that_of_the_scenes(tmp_path, monkeypatch, capsys):
    scenes = ScenesDataset("val", 24)
    exports.roboflow(tmp_path / "roboflow", valid=scenes)
    truth = scenes.ground_truth()
    names = [exports._saved(scenes, i, tmp_path / "coco/val2017", f"{i:012}.png") for i in range(24)]
    images = [image | {"file_name": name} for image, name in zip(truth["images"], names, strict=True)]
    exports._write(tmp_path / "coco/annotations/instances_val2017.json", truth | {"images": images})

    monkeypatch.chdir(tmp_path)
    found = {}
    for name, data in {"scenes": "scenes", "coco": "coco:coco", "roboflow": "coco:roboflow"}.items():
        run("evaluate.py", "--data", data, "--images", 24, "--out", f"{name}.json")
        report = json.loads((tmp_path / f"{name}.json").read_text())
        found[name] = {key: report[key] for key in ("numbers", "AP_interval", "category_AP", "images")}
        printed = capsys.readouterr()
    assert found["scenes"]["numbers"]["AP"] > 0.5
    assert found["roboflow"]["category_AP"].keys() == found["scenes"]["category_AP"].keys()
    assert found["roboflow"] == found["coco"] == found["scenes"]
    assert "       2  circle        1  circle" in printed.out  # the mapping is shown
    assert "the category 'shapes' (0) is left out: it groups others and has no objects" in printed.err


@pytest.mark.parametrize(
    ("there", "asked", "found"),
    [
        ("train2017 val2017", "val", "val2017"),
        ("train2017 val2017", "train", "train2017"),
        ("train valid test", "val", "valid"),
        ("train valid test", "valid", "valid"),
        ("Train Validation", "val", "Validation"),
        ("Training Testing", "test", "Testing"),
        ("val valid", "val", "val"),  # the name itself comes first
        ("train-2014 val_2014", "val", "val_2014"),
        ("val2017", "validation", "val2017"),
        ("default", "default", "all"),
        ("fold1 fold2", "fold2", "fold2"),
    ],
)
def test_a_split_is_found_by_its_name_or_its_use(tmp_path, there, asked, found):
    for split in there.split():
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/instances_{split}.json").write_text("{}")
    assert find_split(tmp_path, asked).name == found


@pytest.mark.parametrize(
    ("there", "asked", "message"),
    [
        ("train test", "val", r"has no split 'val'; it has test, train\. An export of its own in .*/val would be one$"),
        ("train2017", "val2017", r"has no split 'val2017'; it has train2017\."),
        ("val2014", "val2017", r"has no split 'val2017'; it has val2014\."),
        ("fold1", "fold3", r"has no split 'fold3'; it has fold1\."),
        ("default", "val", r"no split 'val': it is not divided, and all of it is the split 'all'\. .* into .*/tr"),
        ("val2014 val2017", "val", r"several splits that could be 'val': val2014, val2017; name one in full"),
    ],
)
def test_a_split_that_is_not_there_is_an_error_with_those_that_are(tmp_path, there, asked, message):
    for split in there.split():
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/instances_{split}.json").write_text("{}")
    with pytest.raises((MissingFileError, InputError), match=message):
        find_split(tmp_path, asked)


def test_folders_without_annotations_are_refused(tmp_path):
    with pytest.raises(MissingFileError, match=r"there is no folder .*nowhere$"):
        find_split(tmp_path / "nowhere", "val")
    with pytest.raises(MissingFileError, match=r"no annotations in .*: neither annotations/inst"):
        find_split(tmp_path, "val")


def test_training_on_data_that_are_not_divided_is_refused_with_a_remedy(tmp_path, capsys):
    exports.label_studio(tmp_path / "export", SCENES)
    out = tmp_path / "gates"
    error = refusal(capsys, "train_gates.py", "--data", f"coco:{tmp_path / 'export'}", "--out", out)
    assert "export has no split 'train': it is not divided, and all of it is the split 'all'. To train and to" in error
    assert not out.exists()


@pytest.mark.parametrize(
    "path", ["images/{}", "images\\1/{}", "..\\..\\label-studio\\media\\upload\\4\\{}", "/data/{}"]
)
def test_paths_of_the_server_of_label_studio_are_taken_for_the_images_beside(tmp_path, path):
    dataset = detr_jax.open_dataset(f"coco:{exports.label_studio(tmp_path, SCENES, path)}", "all")
    assert dataset.image_name(3).startswith(str(tmp_path / "images"))
    np.testing.assert_array_equal(dataset[3].image, SCENES[3].image)
    assert dataset.name == f"{tmp_path.name}-all"


def test_two_images_that_are_one_file_are_refused(tmp_path):
    exports.label_studio(tmp_path, SCENES)

    def collide(content):
        name = content["images"][0]["file_name"].removeprefix("images/")
        for project in (0, 1):
            content["images"][project]["file_name"] = f"/data/upload/{project}/{name}"

    exports.edit(tmp_path / "result.json", collide)
    with pytest.raises(
        InputError, match=r"result\.json names /data/upload/0/.*png and /data/upload/1/.*, but there is"
    ):
        detr_jax.open_dataset(f"coco:{tmp_path}", "all")


def test_annotations_without_their_images_are_refused(tmp_path):
    exports.cvat(tmp_path, default=SCENES)
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(
        MissingFileError, match=r"6 of the 6 images that .*instances_default\.json names are not in .*/def"
    ):
        detr_jax.open_dataset(f"coco:{tmp_path}", "default")


@pytest.mark.parametrize(
    ("first", "others", "left_out"),
    [
        (("shapes", "none"), "shapes", True),
        (("circle", "none"), "circle", True),  # the group is named like a class
        (("none", "none"), "shapes", True),  # nothing is in it
        (("person", "person"), "shapes", False),  # as in COCO
        (("person", "none"), "none", False),
        (("shapes", ""), "", False),
        (("shapes", None), None, False),
    ],
)
def test_categories_that_group_others_are_left_out(tmp_path, first, others, left_out):
    exports.roboflow(tmp_path, valid=SCENES)

    def rename(content):
        for category in content["categories"]:
            category["supercategory"] = others
        content["categories"][0] = {"id": 0, "name": first[0], "supercategory": first[1]}

    exports.edit(tmp_path / "valid/_annotations.coco.json", rename)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        dataset = detr_jax.open_dataset(f"coco:{tmp_path}", "val")
        names = [category["name"] for category in with_classes(dataset, SCENES_LABELS)[0].categories()]
    assert any("is left out: it groups others and has no objects" in str(w.message) for w in said) == left_out
    assert len(names) == 8 + (not left_out) and set(names) >= {name for name in SCENES_LABELS if name} - {"circle"}


@GROUP
def test_a_group_that_has_objects_is_a_category(tmp_path):
    exports.roboflow(tmp_path, valid=SCENES)
    exports.edit(
        tmp_path / "valid/_annotations.coco.json", lambda content: content["annotations"][0].update(category_id=0)
    )
    dataset = detr_jax.open_dataset(f"coco:{tmp_path}", "val", 1)
    with pytest.warns(UserWarning, match="no class for 1 of the 9 categories of valid, .*: shapes"):
        with_classes(dataset, SCENES_LABELS)
