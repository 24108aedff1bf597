"""COCO 2017, or any data set with annotations in its format, as annotation tools export them."""

import json
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from detr_jax.data.coco_layouts import WHOLE, SplitFiles, find_split
from detr_jax.data.dataset import Example, Json, digest
from detr_jax.data.images import is_sideways, read_image
from detr_jax.errors import InputError, MissingFileError


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


_ID = ("a whole number from 0", lambda value: type(value) is int and value >= 0)
_SIDE = ("a whole number from 1", lambda value: type(value) is int and value >= 1)
_TEXT = ("a text", lambda value: isinstance(value, str))
_CONTENT: dict[str, dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "images": {"id": _ID, "file_name": _TEXT, "height": _SIDE, "width": _SIDE},
    "annotations": {
        "id": ("anything", lambda value: True),
        "image_id": _ID,
        "category_id": _ID,
        "bbox": (
            "four finite numbers x, y, width, height",
            lambda value: isinstance(value, list) and len(value) == 4 and all(map(_is_number, value)),
        ),
        "area": ("a finite number", _is_number),
        "iscrowd": ("0 or 1", lambda value: value in (0, 1)),
    },
    "categories": {"id": _ID, "name": _TEXT},
}
"""Keys of the entries of each section, and their right values."""
_ASSUMED: dict[str, tuple[str, Callable[[Json], float]]] = {
    "area": ("that of the box", lambda annotation: annotation["bbox"][2] * annotation["bbox"][3]),
    "iscrowd": ("0", lambda annotation: 0),
}
"""Keys that annotations may lack, and what is assumed then. All others are needed."""


class CocoDataset:
    """One split of a folder in COCO's layout or an export of Roboflow, CVAT or Label Studio; see `find_split`.

    Images come in the order of their ids, those without objects included. The boxes and labels of an example are the
    official training targets: no crowd regions, boxes clipped to the image, none that are empty then. A label is the
    category's id; see `detr_jax.data.classes` for detectors with other numbers. The ground truth keeps everything.
    Boxes refer to the stored pixels, whatever rotation the EXIF data ask for; the first such image gives a warning.
    A warning says what is assumed where annotations lack an area or `iscrowd`, and which categories are left out
    because they only group others.

    Args:
        images: use the first so many images only.

    Raises:
        MissingFileError: if the folder, the split or an image that is to be used does not exist.
        InputError: if the annotation file is damaged or incomplete, or there are fewer images than asked for.
    """

    def __init__(self, root: Path, split: str, images: int | None = None):
        files = find_split(Path(root), split)
        path = files.annotations
        self.name = files.name if files.name != WHOLE else f"{Path(root).resolve().name}-{WHOLE}"
        data = path.read_bytes()
        content = _checked_annotations(path, data)
        available = len(content["images"])
        if images is not None and not 0 < images <= available:
            raise InputError(f"{path} has {available} images, asked for {images}")
        self.fingerprint = digest(data, str(images or available))
        self._images = sorted(content["images"], key=lambda image: image["id"])[:images]
        used = set(self.image_ids())
        annotations = [a for a in content["annotations"] if a["image_id"] in used]
        self._ground_truth = content | {"images": self._images, "annotations": annotations}
        self.has_annotations = bool(annotations)
        self._objects = defaultdict(list)
        for annotation in annotations:
            if not annotation["iscrowd"]:
                self._objects[annotation["image_id"]].append(annotation)
        self._rotation_reported = False
        self._paths = _image_paths(files, [image["file_name"] for image in self._images])

        outside = [o["id"] for image in self._images for o in self._objects[image["id"]] if _is_outside(o, image)]
        if outside:
            warnings.warn(
                f"{path} has boxes outside their images: {len(outside)}, the first of annotation {outside[0]!r}. Boxes "
                "of photographs that EXIF data rotate must refer to the stored pixels",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        """Raises an InputError if the file is damaged or has another size than the annotation file says."""
        entry, path = self._images[index], self._paths[index]
        image, orientation = read_image(Path(path))
        height, width = entry["height"], entry["width"]
        if image.shape[:2] != (height, width):
            turned = ""
            if is_sideways(orientation) and image.shape[:2] == (width, height):
                turned = (
                    f", the size in which it is displayed: its EXIF orientation is {orientation}. Boxes must refer to "
                    "the stored pixels: store the image upright, without an orientation"
                )
            raise InputError(
                f"{path} is {image.shape[1]}x{image.shape[0]} pixels, its annotation says {width}x{height}{turned}"
            )
        if orientation != 1 and not self._rotation_reported:
            self._rotation_reported = True
            warnings.warn(
                f"{path} has the EXIF orientation {orientation}; its boxes are taken to refer to the stored pixels, "
                "not to the rotated photograph (said once for the data set)",
                stacklevel=2,
            )
        objects = self._objects[entry["id"]]
        boxes = np.array([o["bbox"] for o in objects], np.float32).reshape(-1, 4)
        labels = np.array([o["category_id"] for o in objects], np.int32)
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.clip(0, np.array([width, height, width, height], np.float32))
        solid = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return Example(entry["id"], image, boxes[solid], labels[solid])

    def image_sizes(self) -> np.ndarray:
        return np.array([(image["height"], image["width"]) for image in self._images])

    def image_ids(self) -> list[int]:
        return [image["id"] for image in self._images]

    def image_name(self, index: int) -> str:
        return self._paths[index]

    def categories(self) -> list[Json]:
        return self._ground_truth["categories"]

    def ground_truth(self) -> Json:
        return self._ground_truth


def _is_outside(annotation: Json, image: Json) -> bool:
    x, y, width, height = annotation["bbox"]
    return min(width, height) > 0 and not (-width < x < image["width"] and -height < y < image["height"])


def _image_paths(files: SplitFiles, names: list[str]) -> list[str]:
    """Files of images by their names in the annotation file; refuses names without a file, and two of one file."""
    paths = [files.image(name) for name in names]
    if missing := [name for name, path in zip(names, paths, strict=True) if path is None]:
        raise MissingFileError(
            f"{len(missing)} of the {len(names)} images that {files.annotations} names are not in any of "
            f"{', '.join(map(str, files.folders))}; the first is {missing[0]}"
        )
    found = list(map(str, paths))
    name_of: dict[str, str] = {}
    for name, path in zip(names, found, strict=True):
        if name_of.setdefault(path, name) != name:
            raise InputError(f"{files.annotations} names {name_of[path]} and {name}, but there is only {path}")
    return found


def _checked_annotations(path: Path, data: bytes) -> dict[str, list[dict[str, Any]]]:
    """The entries of an annotation file, checked and complete, with the keys of `_CONTENT` only."""
    try:
        content = json.loads(data)
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not an object with {', '.join(_CONTENT)}")

    entries: dict[str, list[dict[str, Any]]] = {}
    for section, checks in _CONTENT.items():
        if not isinstance(content.get(section), list):
            raise InputError(f"{path} has no list {section!r}; an empty one says that there are none")
        for position, entry in enumerate(content[section]):
            name = f"{path}: entry {position} of {section!r}"
            if not isinstance(entry, dict):
                raise InputError(f"{name} is {entry!r:.50}, not an object with {', '.join(checks)}")
            for key, (right, is_right) in checks.items():
                if key not in entry and key not in _ASSUMED:
                    needed = ", ".join(key for key in checks if key not in _ASSUMED)
                    raise InputError(f"{name} has no {key!r}; needed are {needed}")
                if key in entry and not is_right(entry[key]):
                    raise InputError(f"{name} (id {entry['id']!r}) has the {key} {entry[key]!r}, not {right}")
        entries[section] = [{key: entry[key] for key in checks if key in entry} for entry in content[section]]

    if not entries["images"]:
        raise InputError(f"{path} has no images")
    for section, reference in (("images", "image_id"), ("categories", "category_id")):
        counts = Counter(entry["id"] for entry in entries[section])
        if len(counts) < len(entries[section]):
            raise InputError(f"{path}: two {section} have the id {counts.most_common(1)[0][0]!r}")
        for position, annotation in enumerate(entries["annotations"]):
            if (id := annotation[reference]) not in counts:
                name = f"{path}: entry {position} of 'annotations' (id {annotation['id']!r})"
                raise InputError(f"{name} has the {reference} {id!r}, which none of the {section} has")

    notes = []
    for key, (assumed, value) in _ASSUMED.items():
        if incomplete := [annotation for annotation in entries["annotations"] if key not in annotation]:
            of = f"{len(incomplete)} of the {len(entries['annotations'])} annotations"
            notes.append(f"no {key} in {of}, taken to be {assumed}")
            for annotation in incomplete:
                annotation[key] = value(annotation)
    for group in _groups(content["categories"], {annotation["category_id"] for annotation in entries["annotations"]}):
        notes.append(f"the category {group['name']!r} ({group['id']}) is left out: it groups others and has no objects")
        entries["categories"] = [category for category in entries["categories"] if category["id"] != group["id"]]
    if notes:
        warnings.warn(f"{path}: {'; '.join(notes)}", stacklevel=3)
    return entries


def _groups(categories: list[Json], with_objects: set[int]) -> list[Json]:
    """Categories without objects that are the supercategory of others, such as the first of Roboflow's exports.

    That one is also known by being the only one whose own supercategory is "none"; it may be named like a class.
    """
    above = Counter(str(category.get("supercategory") or "") for category in categories)

    def is_group(category: Json) -> bool:
        own = str(category.get("supercategory") or "")
        first = own == "none" and above["none"] == 1 < len(categories) and not above[""]
        return first or (own != category["name"] and above[category["name"]] > 0)

    return [category for category in categories if category["id"] not in with_objects and is_group(category)]
