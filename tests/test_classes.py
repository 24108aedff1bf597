"""Classes of a detector and categories of a data set, matched by name or by a table."""

import json
import warnings
from pathlib import Path

import exports
import numpy as np
import pytest
from commands import refusal, run
from tiny import TINY_CONFIG, annotation, write_coco

import detr_jax
from detr_jax.commands.options import DataOptions
from detr_jax.data.classes import match_classes, read_table, with_classes
from detr_jax.data.dataset import Subset
from detr_jax.data.image_list import GivenImages
from detr_jax.data.registry import open_dataset
from detr_jax.data.scenes import ScenesDataset
from detr_jax.errors import InputError, InputTypeError, MissingFileError
from detr_jax.evaluation.coco_ap import score
from detr_jax.models.labels import COCO_LABELS, SCENES_LABELS


def categories(*names, start=1):
    return [{"id": id, "name": name} for id, name in enumerate(names, start)]


def shifted(root, by):
    """A data set whose category ids are not the detector's."""
    write_coco(root, [(20, 30), (30, 20)], [annotation(1, 1, (1, 2, 9, 9)), annotation(2, 2, (3, 4, 8, 8), 2)])
    path = root / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    for category in content["categories"]:
        category["id"] += by
    for a in content["annotations"]:
        a["category_id"] += by
    path.write_text(json.dumps(content))
    return open_dataset(f"coco:{root}", "val")


def results(dataset):
    """Of a detector that finds everything and speaks of its own classes."""
    classes = {1: 1, 2: 2}
    return [
        {"image_id": image, "category_id": classes[image], "bbox": [*box[:2], *(box[2:] - box[:2])], "score": 0.9}
        for image, box in ((e.image_id, e.boxes[0].astype(float)) for e in (dataset[0], dataset[1]))
    ]


def test_ids_that_are_the_classes_change_nothing():
    dataset = ScenesDataset("val", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matched, mapping = with_classes(dataset, SCENES_LABELS)
    assert matched is dataset
    assert str(mapping) == "all 8 categories of the data are classes of the detector, with the same ids"


@pytest.mark.parametrize("by", [0, -1, 40])
def test_classes_are_matched_by_name(tmp_path, by):
    dataset, mapping = with_classes(shifted(tmp_path, by), TINY_CONFIG.labels)
    assert mapping.classes == {1 + by: 1, 2 + by: 2}
    truth = dataset.ground_truth()
    assert truth["categories"] == dataset.categories() == categories("cat", "dog")
    assert [dataset[i].labels.tolist() for i in (0, 1)] == [[1], [2]]
    scores = score(truth, results(dataset), dataset.image_ids())
    assert scores.numbers["AP"] == pytest.approx(1)
    assert set(scores.category_ap) == {"cat", "dog"}


def test_the_mapping_is_shown():
    mapping = match_classes(("", "cat", "dog"), [*categories("dog", "Cat", start=0), {"id": 7, "name": "cow"}])
    assert str(mapping).splitlines() == [
        "category  name  class  name of the class",
        "       0  dog       2  dog",
        "       1  Cat       1  cat",
        "       7  cow       -",
    ]


def test_the_page_shows_a_mapping_as_it_is_printed():
    page = (Path(__file__).parent.parent / "docs/own-data.md").read_text(encoding="utf-8")
    mapping = match_classes(("helmet", "vest"), categories("helmet", "Hi-Vis Vest", "glove"), {"Hi-Vis Vest": "vest"})
    assert f"```\n{mapping}\n```" in page


def test_no_name_in_common_is_refused():
    with pytest.raises(InputError, match="knows none of the data's categories: they are helmet, vest, its classes are"):
        match_classes(COCO_LABELS, categories("helmet", "vest"))
    assert match_classes(COCO_LABELS, []).classes == {}


def test_categories_without_a_class_count_as_not_found(tmp_path):
    dataset = shifted(tmp_path, 0)
    with pytest.warns(UserWarning, match="no class for 1 of the 2 categories of val2017, .*: dog"):
        matched, mapping = with_classes(dataset, ("cat", "cow"))
    assert (mapping.classes, mapping.missing) == ({1: 0}, (2,))
    assert [a["category_id"] for a in matched.ground_truth()["annotations"]] == [0, 2]
    assert [matched[i].labels.tolist() for i in (0, 1)] == [[0], []]
    assert matched[1].boxes.shape == (0, 4)
    found = [r | {"category_id": 0} for r in results(dataset)]
    assert score(matched.ground_truth(), found, matched.image_ids()).numbers["AP"] < 0.6


def test_names_that_say_nothing_leave_it_to_the_ids():
    dataset = ScenesDataset("val", 2)
    shapes = [c | {"name": "shape"} if 2 <= c["id"] <= 7 else c for c in dataset.categories()]
    mapping = match_classes(SCENES_LABELS, shapes)
    assert mapping.by_id == (2, 3, 4, 5, 6, 7) and mapping.classes == {i: i for i in range(1, 9)}
    assert "2  shape       2  square (matched by id)" in str(mapping)
    placeholders = tuple(f"LABEL_{i}" for i in range(9))
    with pytest.warns(UserWarning, match=r"matched by their ids: circle is LABEL_1 \(1\)"):
        assert with_classes(dataset, placeholders)[0].ground_truth() == dataset.ground_truth()
    # A class that a category of its name has is not given away.
    mapping = match_classes(("", "cat", "dog"), [{"id": 1, "name": "dog"}, *categories("pet", "pet", start=2)])
    assert (mapping.classes, mapping.missing) == ({1: 2}, (2, 3))


def test_relabelled_data_keep_their_images(tmp_path):
    dataset = shifted(tmp_path, -1)
    matched, _ = with_classes(dataset, TINY_CONFIG.labels)
    assert (matched.name, matched.image_ids(), len(matched)) == (dataset.name, dataset.image_ids(), 2)
    np.testing.assert_array_equal(matched.image_sizes(), dataset.image_sizes())
    np.testing.assert_array_equal(matched[1].image, dataset[1].image)
    assert matched.image_name(1) == dataset.image_name(1)


PETS = ("", "cat", "dog", "bird")


def test_a_table_names_classes_that_have_other_names(tmp_path):
    mapping = match_classes(PETS, categories("Katze", "dog", "Kater", start=0), {"katze": "cat", "Kater": "CAT"})
    assert (mapping.given, mapping.by_name, mapping.missing) == ({0: 1, 2: 1}, {1: 2}, ())
    assert str(mapping).splitlines()[1:] == [
        "       0  Katze      1  cat (given)",
        "       1  dog        2  dog",
        "       2  Kater      1  cat (given)",
    ]
    # What the table says comes before a name in common, and a placeholder is a name like others.
    assert match_classes(PETS, categories("cat", "dog"), {"cat": "dog"}).classes == {1: 2, 2: 2}
    assert match_classes(("LABEL_0", "LABEL_1"), categories("cat"), {"cat": "LABEL_0"}).classes == {1: 0}
    # The exact name, where others differ from it in case alone.
    assert match_classes(PETS, categories("Cat", "cat"), {"Cat": "bird"}).classes == {1: 3, 2: 1}


def test_categories_of_one_class_are_one(tmp_path):
    dataset, _ = with_classes(shifted(tmp_path, 4), ("", "animal"), {"cat": "animal", "dog": "animal"})
    assert dataset.categories() == dataset.ground_truth()["categories"] == categories("animal")
    assert [dataset[i].labels.tolist() for i in (0, 1)] == [[1], [1]]
    found = [r | {"category_id": 1} for r in results(dataset)]
    scores = score(dataset.ground_truth(), found, dataset.image_ids())
    assert scores.numbers["AP"] == pytest.approx(1) and set(scores.category_ap) == {"animal"}


def test_matched_data_stay_matched(tmp_path):
    before = shifted(tmp_path, 0)
    dataset, mapping = with_classes(before, ("", "Hund", "Katze"), {"cat": "Katze", "dog": "Hund"})
    assert with_classes(dataset, ("", "Hund", "Katze")) == (dataset, mapping)
    part = Subset(dataset, 0, 1)  # by the names of the classes
    assert with_classes(part, ("", "Hund", "Katze"))[0] is part
    assert dataset.fingerprint != before.fingerprint == with_classes(before, ("cat", "dog"))[0].fingerprint


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"hund": "dog"}, "no category of the data is named 'hund'; known are Katze, Vogel"),
        ({"Katz": "cat"}, "no category of the data is named 'Katz'; close ones are Katze"),
        ({"Katze": "cats"}, "no class is named 'cats'; close ones are cat$"),
        ({"Katze": "horse"}, "no class is named 'horse'; known are cat, dog, dog$"),
        ({"Katze": "dog"}, r"the detector has 2 classes that are named 'dog': \[2, 3\]"),
        ({"Katze": 1}, "classes= gives names for names, not 1 for 'Katze'"),
    ],
)
def test_names_that_do_not_exist_are_refused(table, message):
    with pytest.raises((InputError, InputTypeError), match=message):
        match_classes(("", "cat", "dog", "dog"), categories("Katze", "Vogel"), table)
    with pytest.raises(InputError, match="no category of the data is named 'Katze'; known are none"):
        match_classes(("", "cat"), [], {"Katze": "cat"})


def test_tables_are_read_from_the_command_line_and_from_files(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"a=b": "cat", "Vogel": "bird"}))
    table = {"Katze": "cat", "a=b": "cat", "Vogel": "bird"}
    assert read_table(("Katze = cat", str(path), "Vogel=bird")) == table
    assert read_table(()) == {}
    with pytest.raises(InputError, match="--classes gives 'Vogel' two classes, 'bird' and 'cat'"):
        read_table((str(path), "Vogel=cat"))
    with pytest.raises(MissingFileError, match="--classes Katze is neither NAME_IN_DATA=NAME_IN_DETECTOR nor a file"):
        read_table(("Katze",))
    for text, message in (
        ("{", "is not valid JSON"),
        ("[1]", "must hold an object of names"),
        ('{"a": 1}', "must hold"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=rf"classes\.json {message}"):
            read_table((str(path),))


@pytest.fixture
def in_german(tmp_path):
    """Scenes in COCO's layout whose categories have other names than the detector's classes."""
    for split in ("train", "val"):
        scenes = ScenesDataset(split, 8)
        exports.cvat(tmp_path / "export", **{split: scenes})
        path = tmp_path / "export/annotations" / f"instances_{split}.json"
        exports.edit(path, lambda content: [c.update(name=f"{c['name']} (de)") for c in content["categories"]])
    return tmp_path / "export"


@pytest.mark.parametrize("script", ["train_gates.py", "search_plan.py", "evaluate.py"])
def test_a_command_refuses_foreign_categories_before_it_begins(in_german, tmp_path, capsys, script):
    counts = {
        "train_gates.py": ("--split.calib", 2),
        "search_plan.py": (
            *("--budget", "density=0.2", "--statistics-images", 2, "--calibration-images", 2),
            *("--accuracy-images", 2, "--eval-images", 8),
        ),
        "evaluate.py": (),
    }
    out = tmp_path / "out.json"
    options = ("--coco", in_german, *counts[script], "--out", out)
    error = refusal(capsys, script, *options)
    assert "the detector knows none of the data's categories: they are arrow (de), crescent (de)" in error
    assert error.endswith("--classes NAME_IN_DATA=NAME_IN_DETECTOR, in Python classes=")
    assert "no class is named 'cirle'; close ones are circle" in refusal(
        capsys, script, *options, "--classes", "circle (de)=cirle"
    )
    assert not out.exists()


def test_a_table_makes_the_ap_that_of_the_names(in_german, tmp_path, capsys):
    table = {f"{name} (de)": name for name in SCENES_LABELS if name}
    (tmp_path / "classes.json").write_text(json.dumps(table))
    run("evaluate.py", "--coco", in_german, "--classes", tmp_path / "classes.json", "--out", tmp_path / "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    scores = detr_jax.evaluate(detr_jax.load("detr-tiny"), ScenesDataset("val", 8), progress=False)
    assert report["numbers"] == scores.numbers and report["category_AP"] == scores.category_ap
    assert "circle (de)        1  circle (given)" in capsys.readouterr().out
    data = detr_jax.open_dataset(f"coco:{in_german}", "val")
    given = detr_jax.evaluate(detr_jax.load("detr-tiny"), data, classes=table, progress=False)
    assert given.numbers == scores.numbers


def test_commands_show_a_mapping_once(in_german, tmp_path, capsys):
    data = DataOptions(coco=in_german, classes=("circle (de)=circle",))
    splits = [data.open(split) for split in ("train", "val")]
    with pytest.warns(UserWarning, match="no class for 7 of the 8 categories"):
        found = data.matched(SCENES_LABELS, *splits)
    assert [len(dataset) for dataset in found] == [8, 8]
    assert capsys.readouterr().out.count("circle (given)") == 1
    photograph = DataOptions().matched(SCENES_LABELS, GivenImages([np.zeros((8, 8, 3), np.uint8)]))
    assert len(photograph) == 1 and not capsys.readouterr().out  # there is nothing to match
