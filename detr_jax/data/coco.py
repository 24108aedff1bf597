"""COCO 2017, or any data set in its layout."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from detr_jax.data.dataset import Example
from detr_jax.data.images import read_image
from detr_jax.errors import InputError, MissingFileError

_KEYS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
    "categories": ("id", "name"),
}
_IMAGE_NUMBERS = {"id": 0, "height": 1, "width": 1}


class CocoDataset:
    """One split: `root/<split>/*.jpg` and `root/annotations/instances_<split>.json`.

    Images come in the order of their ids, those without objects included. The boxes and labels of an example are the
    official training targets: no crowd regions, boxes clipped to the image, none that are empty then. A label is the
    category's id. The ground truth keeps everything.

    Args:
        root: folder of the data set.
        split: "val2017", "train2017", or the name of another split in the same layout.
        images: use the first so many images only.

    Raises:
        FileNotFoundError: if the folder, the annotation file or an image that is to be used does not exist.
        ValueError: if the annotation file does not hold what it should, or there are fewer images than asked for.
    """

    def __init__(self, root: Path, split: str, images: int | None = None):
        self._folder = Path(root) / split
        path = Path(root) / "annotations" / f"instances_{split}.json"
        self.name = split
        if not self._folder.is_dir():
            raise MissingFileError(f"there is no folder {self._folder} with the images of {split}")

        content = _read_annotations(path)
        available = len(content["images"])
        if images is not None and not 0 < images <= available:
            raise InputError(f"{path} has {available} images, asked for {images}")
        self._images = sorted(content["images"], key=lambda image: image["id"])[:images]
        used = set(self.image_ids())
        self._ground_truth = {
            "images": self._images,
            "annotations": [a for a in content["annotations"] if a["image_id"] in used],
            "categories": content["categories"],
        }
        self._objects = defaultdict(list)
        for annotation in self._ground_truth["annotations"]:
            if not annotation["iscrowd"]:
                self._objects[annotation["image_id"]].append(annotation)

        names = [image["file_name"] for image in self._images]
        if missing := [name for name in names if not (self._folder / name).is_file()]:
            raise MissingFileError(
                f"{len(missing)} of the {len(self)} images that {path} names are not in {self._folder}, "
                f"the first is {missing[0]}"
            )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        """Reads an image.

        Raises:
            ValueError: if its file is damaged or has another size than the annotation file says.
        """
        entry = self._images[index]
        path = self._folder / entry["file_name"]
        image = read_image(path)
        height, width = entry["height"], entry["width"]
        if image.shape[:2] != (height, width):
            raise InputError(
                f"{path} is {image.shape[1]}x{image.shape[0]} pixels, its annotation says {width}x{height}"
            )
        objects = self._objects.get(entry["id"], [])
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

    def ground_truth(self) -> dict:
        return self._ground_truth


def _read_annotations(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The entries of an annotation file, checked and without what boxes do not need."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise MissingFileError(f"there is no annotation file {path}") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not an object with {', '.join(_KEYS)}")

    entries: dict[str, list[dict[str, Any]]] = {}
    for section, keys in _KEYS.items():
        if not isinstance(content.get(section), list):
            raise InputError(f"{path} has no list {section!r}")
        try:
            entries[section] = [{key: entry[key] for key in keys} for entry in content[section]]
        except KeyError as error:
            raise InputError(f"{path}: an entry of {section!r} has no {error}; needed are {', '.join(keys)}") from None
        except TypeError:
            raise InputError(f"{path}: an entry of {section!r} is not an object with {', '.join(keys)}") from None

    for image in entries["images"]:
        if not all(isinstance(image[key], int) and image[key] >= least for key, least in _IMAGE_NUMBERS.items()):
            raise InputError(f"{path}: the image {image} needs whole numbers: an id from 0, a height and width from 1")
        if not isinstance(image["file_name"], str):
            raise InputError(f"{path}: the image {image['id']} has file_name {image['file_name']!r}, not a text")
    image_ids = {image["id"] for image in entries["images"]}
    category_ids = {category["id"] for category in entries["categories"]}
    if not image_ids:
        raise InputError(f"{path} has no images")
    if len(image_ids) < len(entries["images"]):
        raise InputError(f"{path}: two images have the same id")
    for annotation in entries["annotations"]:
        name = f"{path}: annotation {annotation['id']}"
        if annotation["image_id"] not in image_ids:
            raise InputError(f"{name} belongs to image {annotation['image_id']}, which is not in the file")
        if annotation["category_id"] not in category_ids:
            raise InputError(f"{name} is of category {annotation['category_id']}, which is not in the file")
        if not _is_box(annotation["bbox"]):
            raise InputError(f"{name} has bbox {annotation['bbox']}, not four finite numbers x, y, width, height")
        if not (isinstance(annotation["area"], int | float) and math.isfinite(annotation["area"])):
            raise InputError(f"{name} has area {annotation['area']}, not a finite number")
        if annotation["iscrowd"] not in (0, 1):
            raise InputError(f"{name} has iscrowd {annotation['iscrowd']}, neither 0 nor 1")
    return entries


def _is_box(value: Any) -> bool:
    numbers = isinstance(value, list) and all(isinstance(v, int | float) for v in value)
    return numbers and len(value) == 4 and all(map(math.isfinite, value))
