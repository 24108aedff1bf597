"""Classes of a detector and categories of a data set, matched by name."""

import json
import warnings

import numpy as np
import pytest
from tiny import TINY_CONFIG, annotation, write_coco

from detr_jax.data.classes import match_classes, with_classes
from detr_jax.data.registry import open_dataset
from detr_jax.data.scenes import ScenesDataset
from detr_jax.errors import InputError
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
    assert mapping.by_id == (2, 3, 4, 5, 6, 7) and mapping.is_identity
    assert "2  shape       2  square (matched by id)" in str(mapping)
    placeholders = tuple(f"LABEL_{i}" for i in range(9))
    with pytest.warns(UserWarning, match=r"matched by their ids: circle is LABEL_1 \(1\)"):
        assert with_classes(dataset, placeholders)[0] is dataset
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
