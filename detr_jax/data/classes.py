"""Classes of a detector and categories of a data set, matched by name or by a table."""

import difflib
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from detr_jax.data.dataset import Dataset, Example, Json, Subset, digest
from detr_jax.errors import InputError, InputTypeError, MissingFileError

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
        given: class of each category that a table names, by category id.
    """

    categories: dict[int, str]
    by_name: dict[int, int]
    by_id: tuple[int, ...]
    labels: tuple[str, ...]
    given: dict[int, int] = field(default_factory=dict)

    @property
    def classes(self) -> dict[int, int]:
        """Class by category id, for categories that the detector knows."""
        return self.given | self.by_name | {id: id for id in self.by_id}

    @property
    def missing(self) -> tuple[int, ...]:
        """Category ids that the detector does not know."""
        return tuple(id for id in self.categories if id not in self.classes)

    @property
    def is_identity(self) -> bool:
        """True if every category is the class of its own id by its name."""
        return all(self.by_name.get(id) == id for id in self.categories)

    def __str__(self) -> str:
        if not self.categories:
            return "the data have no categories"
        if self.is_identity:
            return f"all {len(self.categories)} categories of the data are classes of the detector, with the same ids"
        rows = [("category", "name", "class", "name of the class")]
        for id, name in self.categories.items():
            found = self.classes.get(id)
            how = " (matched by id)" if id in self.by_id else " (given)" if id in self.given else ""
            title = "" if found is None else self.labels[found] + how
            rows.append((str(id), name, "-" if found is None else str(found), title))
        w = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(f"{a:>{w[0]}}  {b:<{w[1]}}  {c:>{w[2]}}  {d}".rstrip() for a, b, c, d in rows)


def match_classes(
    labels: Sequence[str], categories: Sequence[Json], classes: Mapping[str, str] | None = None
) -> ClassMapping:
    """Categories of a data set matched with a detector's classes by name, whatever its case.

    Names that several categories or several classes share, and placeholders such as LABEL_3, are ambiguous: there, and
    only there, a category is the class of its id.

    Args:
        labels: name of every class, empty for one without.
        categories: entries with `id` and `name`, as in COCO's `instances_*.json`.
        classes: name of the class for the name of a category, where they differ. Several categories may be one class.

    Raises:
        InputError: if there are categories, and the detector knows none of them; or a name in `classes` does not exist.
        InputTypeError: if something in `classes` is not a name.
    """
    names = {category["id"]: category["name"] for category in categories}
    given = _given(labels, names, classes or {})
    key = {id: _key(name) for id, name in names.items() if id not in given}
    keys_of_classes = [_key(label) for label in labels]
    in_data, in_detector = Counter(key.values()), Counter(keys_of_classes)

    def is_ambiguous(id: int) -> bool:
        if not 0 <= id < len(labels) or not labels[id]:
            return False
        return in_data[key[id]] > 1 or in_detector[key[id]] > 1 or bool(_PLACEHOLDER.fullmatch(labels[id]))

    by_name = {id: keys_of_classes.index(k) for id, k in key.items() if k and in_data[k] == in_detector[k] == 1}
    taken = {*by_name.values(), *given.values()}
    by_id = tuple(id for id in key if id not in by_name and id not in taken and is_ambiguous(id))
    mapping = ClassMapping(names, by_name, by_id, tuple(labels), given)
    if names and not mapping.classes:
        raise InputError(
            f"the detector knows none of the data's categories: they are {_some(names.values())}, its classes are "
            f"{_some(label for label in labels if label)}; say which are the same by --classes "
            "NAME_IN_DATA=NAME_IN_DETECTOR, in Python classes="
        )
    return mapping


def _given(labels: Sequence[str], names: Mapping[int, str], classes: Mapping[str, str]) -> dict[int, int]:
    """Class by category id, as a table of names says."""
    in_detector = {index: label for index, label in enumerate(labels) if label}
    given: dict[int, int] = {}
    for name, label in classes.items():
        if not (isinstance(name, str) and isinstance(label, str)):
            raise InputTypeError(f"classes= gives names for names, not {label!r} for {name!r}")
        categories, found = _ids_of(name, names, "category of the data"), _ids_of(label, in_detector, "class")
        if len(found) > 1:
            raise InputError(f"the detector has {len(found)} classes that are named {label!r}: {found}")
        given |= dict.fromkeys(categories, found[0])
    return given


def _ids_of(name: str, names: Mapping[int, str], what: str) -> list[int]:
    """Ids that have a name, in other case if none has it in just this one."""
    found = [id for id, other in names.items() if other == name]
    found = found or [id for id, other in names.items() if _key(other) == _key(name)]
    if not found:
        spelled = {_key(other): other for other in names.values()}
        close = [spelled[key] for key in difflib.get_close_matches(_key(name), spelled)]
        there = f"close ones are {', '.join(close)}" if close else f"known are {_some(names.values()) or 'none'}"
        raise InputError(f"no {what} is named {name!r}; {there}")
    return found


def read_table(texts: Sequence[str]) -> dict[str, str]:
    """Names of classes for names of categories, from texts NAME_IN_DATA=NAME_IN_DETECTOR and JSON files of such pairs.

    Raises:
        MissingFileError: if a text is neither a pair nor a file.
        InputError: if a file holds something else than an object of texts, or a category is given two classes.
    """
    table: dict[str, str] = {}
    for text in texts:
        name, is_pair, label = text.partition("=")
        for key, value in {name.strip(): label.strip()}.items() if is_pair else _read_json(Path(text)).items():
            if table.setdefault(key, value) != value:
                raise InputError(f"--classes gives {key!r} two classes, {table[key]!r} and {value!r}")
    return table


def _read_json(path: Path) -> dict[str, str]:
    try:
        table = json.loads(path.read_bytes())
    except OSError:
        raise MissingFileError(f"--classes {path} is neither NAME_IN_DATA=NAME_IN_DETECTOR nor a file") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(table, dict) or not all(isinstance(label, str) for label in table.values()):
        raise InputError(f'{path} must hold an object of names such as {{"NAME_IN_DATA": "NAME_IN_DETECTOR"}}')
    return table


def with_classes(
    dataset: Dataset, labels: Sequence[str], classes: Mapping[str, str] | None = None
) -> tuple[Dataset, ClassMapping]:
    """A data set whose category ids are a detector's classes, and the mapping, which `print` shows as a table.

    Objects of categories that the detector does not know stay in the ground truth, where they count as not found, under
    ids beyond its classes; examples leave them out. Warns about them, and about categories matched by id. A data set
    that has these classes from an earlier call keeps them.

    Args:
        classes: see `match_classes`.

    Raises:
        InputError, InputTypeError: see `match_classes`.
    """
    if isinstance(dataset, _Relabelled) and dataset.mapping.labels == tuple(labels) and not classes:
        return dataset, dataset.mapping
    mapping = match_classes(labels, dataset.categories(), classes)
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
        self.name, self.fingerprint, self.mapping = dataset.name, dataset.fingerprint, mapping
        if mapping.given:
            self.fingerprint = digest(dataset.fingerprint, json.dumps(sorted(mapping.given.items())))
        beyond = range(len(mapping.labels), len(mapping.labels) + len(mapping.missing))
        self._classes = mapping.classes
        self._ids = mapping.classes | dict(zip(mapping.missing, beyond, strict=True))

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        known = np.array([label in self._classes for label in example.labels.tolist()], bool)
        labels = np.array([self._classes[label] for label in example.labels[known].tolist()], np.int32)
        return Example(example.image_id, example.image, example.boxes[known], labels)

    def categories(self) -> list[Json]:
        found: dict[int, Json] = {}  # one for all categories that are the same class
        for category in super().categories():
            id = self._ids[category["id"]]
            name = self.mapping.labels[id] if category["id"] in self.mapping.given else category["name"]
            found[id] = category | {"id": id, "name": name}
        return list(found.values())

    def ground_truth(self) -> Json:
        truth = super().ground_truth()
        annotations = [a | {"category_id": self._ids[a["category_id"]]} for a in truth["annotations"]]
        return truth | {"annotations": annotations, "categories": self.categories()}


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _key(name: str) -> str:
    return name.strip().casefold()
