"""COCO 2017, or any data set in its layout."""

import json
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

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
"""Keys that the entries of each section must have, and their right values."""
_BESIDE = "_annotations.coco.json"
"""Annotation file of Roboflow's exports, in the folder of the images."""


class CocoDataset:
    """One split: `root/<split>/*.jpg` and `root/annotations/instances_<split>.json`.

    Images come in the order of their ids, those without objects included. The boxes and labels of an example are the
    official training targets: no crowd regions, boxes clipped to the image, none that are empty then. A label is the
    category's id; see `detr_jax.data.classes` for detectors with other numbers. The ground truth keeps everything.
    Boxes refer to the stored pixels, whatever rotation the EXIF data ask for; the first such image gives a warning.

    Args:
        images: use the first so many images only.

    Raises:
        MissingFileError: if the folder, the annotation file or an image that is to be used does not exist.
        InputError: if the annotation file is damaged or incomplete, or there are fewer images than asked for.
    """

    def __init__(self, root: Path, split: str, images: int | None = None):
        self._folder, self.name = Path(root) / split, split
        path = _annotation_file(Path(root), split)
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

        names = [image["file_name"] for image in self._images]
        if missing := [name for name in names if not (self._folder / name).is_file()]:
            raise MissingFileError(
                f"{len(missing)} of the {len(self)} images that {path} names are not in {self._folder}, "
                f"the first is {missing[0]}"
            )
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
        entry = self._images[index]
        path = self._folder / entry["file_name"]
        image, orientation = read_image(path)
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
        return str(self._folder / self._images[index]["file_name"])

    def categories(self) -> list[Json]:
        return self._ground_truth["categories"]

    def ground_truth(self) -> Json:
        return self._ground_truth


def _is_outside(annotation: Json, image: Json) -> bool:
    x, y, width, height = annotation["bbox"]
    return min(width, height) > 0 and not (-width < x < image["width"] and -height < y < image["height"])


def _annotation_file(root: Path, split: str) -> Path:
    """The annotation file of a split; a MissingFileError names what is there instead."""
    folder, path = root / split, root / "annotations" / f"instances_{split}.json"
    if folder.is_dir() and path.is_file():
        return path
    for beside in (root, folder, root / split.removesuffix("2017")):
        if (beside / _BESIDE).is_file():
            raise MissingFileError(
                f"{beside / _BESIDE} is in the layout of Roboflow's exports, which is not read yet: move the images to "
                f"{folder}/ and the file to {path}"
            )
    there = sorted(p.stem.removeprefix("instances_") for p in path.parent.glob("instances_*.json"))
    splits = f"; there are annotations of {', '.join(there)}" if there and split not in there else ""
    if not folder.is_dir():
        raise MissingFileError(f"there is no folder {folder} with the images of {split}{splits}")
    raise MissingFileError(f"there is no annotation file {path}{splits}")


def _checked_annotations(path: Path, data: bytes) -> dict[str, list[dict[str, Any]]]:
    """The entries of an annotation file, checked, with the keys of `_CONTENT` only."""
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
                if key not in entry:
                    raise InputError(f"{name} has no {key!r}; needed are {', '.join(checks)}")
                if not is_right(entry[key]):
                    raise InputError(f"{name} (id {entry['id']!r}) has the {key} {entry[key]!r}, not {right}")
        entries[section] = [{key: entry[key] for key in checks} for entry in content[section]]

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
    return entries
