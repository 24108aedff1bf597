"""Classes of a detector and categories of a data set, matched by name."""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from detr_jax.data.dataset import Dataset, Example, Json, Subset
from detr_jax.errors import InputError

_PLACEHOLDER = re.compile(r"LABEL_\d+")
"""The names that Hugging Face gives to classes without one."""


@dataclass(frozen=True)
class ClassMapping:
    """Classes of a detector for the categories of a data set.

    Attributes:
        categories: name of every category by id.
        by_name: class of each category that is matched by name, by category id.
        by_id: category ids that are classes themselves, because their name or that of the class is ambiguous.
        labels: names of the detector's classes.
    """

    categories: dict[int, str]
    by_name: dict[int, int]
    by_id: tuple[int, ...]
    labels: tuple[str, ...]

    @property
    def classes(self) -> dict[int, int]:
        """Class by category id, for categories that the detector knows."""
        return self.by_name | {id: id for id in self.by_id}

    @property
    def missing(self) -> tuple[int, ...]:
        """Category ids that the detector does not know."""
        return tuple(id for id in self.categories if id not in self.classes)

    @property
    def is_identity(self) -> bool:
        """Whether every category is the class of its own id."""
        return all(self.classes.get(id) == id for id in self.categories)

    def __str__(self) -> str:
        if not self.categories:
            return "the data have no categories"
        if self.is_identity and not self.by_id:
            return f"all {len(self.categories)} categories of the data are classes of the detector, with the same ids"
        rows = [("category", "name", "class", "name of the class")]
        for id, name in self.categories.items():
            found = self.classes.get(id)
            title = "" if found is None else self.labels[found] + (" (matched by id)" if id in self.by_id else "")
            rows.append((str(id), name, "-" if found is None else str(found), title))
        w = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(f"{a:>{w[0]}}  {b:<{w[1]}}  {c:>{w[2]}}  {d}".rstrip() for a, b, c, d in rows)


def match_classes(labels: Sequence[str], categories: Sequence[Json]) -> ClassMapping:
    """Categories of a data set matched with a detector's classes by name, whatever its case.

    Names that several categories or several classes share, and placeholders such as LABEL_3, are ambiguous: there, and
    only there, a category is the class of its id.

    Args:
        labels: name of every class, empty for one without.
        categories: entries with `id` and `name`, as in COCO's `instances_*.json`.

    Raises:
        InputError: if there are categories, and the detector knows none of them.
    """
    names = {category["id"]: category["name"] for category in categories}
    key = {id: name.strip().casefold() for id, name in names.items()}
    keys_of_classes = [label.strip().casefold() for label in labels]
    in_data, in_detector = Counter(key.values()), Counter(keys_of_classes)

    def is_ambiguous(id: int) -> bool:
        if not 0 <= id < len(labels) or not labels[id]:
            return False
        return in_data[key[id]] > 1 or in_detector[key[id]] > 1 or bool(_PLACEHOLDER.fullmatch(labels[id]))

    by_name = {id: keys_of_classes.index(k) for id, k in key.items() if k and in_data[k] == in_detector[k] == 1}
    by_id = tuple(id for id in names if id not in by_name and id not in by_name.values() and is_ambiguous(id))
    mapping = ClassMapping(names, by_name, by_id, tuple(labels))
    if names and not mapping.classes:
        raise InputError(
            f"the detector knows none of the data's categories: they are {_some(names.values())}, its classes are "
            f"{_some(label for label in labels if label)}"
        )
    return mapping


def with_classes(dataset: Dataset, labels: Sequence[str]) -> tuple[Dataset, ClassMapping]:
    """A data set whose category ids are a detector's classes, and the mapping, which `print` shows as a table.

    Objects of categories that the detector does not know stay in the ground truth, where they count as not found, under
    ids beyond its classes; examples leave them out. Warns about them, and about categories matched by id.

    Raises:
        InputError: see `match_classes`.
    """
    mapping = match_classes(labels, dataset.categories())
    if mapping.missing:
        names = _some(mapping.categories[id] for id in mapping.missing)
        warnings.warn(
            f"the detector has no class for {len(mapping.missing)} of the {len(mapping.categories)} categories of "
            f"{dataset.name}, whose objects count as not found: {names}",
            stacklevel=2,
        )
    if mapping.by_id:
        pairs = _some(f"{mapping.categories[id]} is {mapping.labels[id]} ({id})" for id in mapping.by_id)
        warnings.warn(
            f"categories of {dataset.name} whose names say nothing are matched by their ids: {pairs}", stacklevel=2
        )
    return (dataset if mapping.is_identity else _Relabelled(dataset, mapping)), mapping


class _Relabelled(Subset):
    """A whole data set with the classes of a detector as its categories."""

    def __init__(self, dataset: Dataset, mapping: ClassMapping):
        super().__init__(dataset, 0, len(dataset))
        self.name, self.fingerprint = dataset.name, dataset.fingerprint
        beyond = range(len(mapping.labels), len(mapping.labels) + len(mapping.missing))
        self._classes = mapping.classes
        self._ids = mapping.classes | dict(zip(mapping.missing, beyond, strict=True))

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        known = np.array([label in self._classes for label in example.labels.tolist()], bool)
        labels = np.array([self._classes[label] for label in example.labels[known].tolist()], np.int32)
        return Example(example.image_id, example.image, example.boxes[known], labels)

    def categories(self) -> list[Json]:
        return [category | {"id": self._ids[category["id"]]} for category in super().categories()]

    def ground_truth(self) -> Json:
        truth = super().ground_truth()
        annotations = [a | {"category_id": self._ids[a["category_id"]]} for a in truth["annotations"]]
        return truth | {"annotations": annotations, "categories": self.categories()}


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
