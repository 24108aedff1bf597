"""The data set protocol: indexed examples, and their ground truth in COCO's format."""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from detr_jax.errors import InputError


@dataclass(frozen=True)
class Example:
    """One image with its objects.

    Attributes:
        image_id: id in the data set's ground truth.
        image: (height, width, 3) uint8, RGB.
        boxes: (objects, 4) float32, (x0, y0, x1, y1) in pixels.
        labels: (objects,) int32 class indices.
    """

    image_id: int
    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


class Dataset(Protocol):
    """A finite, indexed data set."""

    name: str
    has_annotations: bool
    """Whether the ground truth says what is in the images; without, AP is undefined."""
    fingerprint: str
    """Equal for the same images and annotations, wherever they are."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def image_sizes(self) -> np.ndarray:
        """(images, 2) int, height and width of every image, known without reading the image."""
        ...

    def image_ids(self) -> list[int]:
        """Ids of the images in index order."""
        ...

    def image_name(self, index: int) -> str:
        """Of an image, for messages."""
        ...

    def categories(self) -> list[dict]:
        """`id` and `name` of every category, those of the ground truth; known without making the ground truth."""
        ...

    def ground_truth(self) -> dict:
        """The annotations as a dictionary in the layout of COCO's `instances_*.json`; empty lists without any."""
        ...


class View:
    """A data set in terms of another one; subclasses override what differs."""

    def __init__(self, dataset: Dataset):
        self._dataset = dataset
        self.name, self.fingerprint = dataset.name, dataset.fingerprint
        self.has_annotations = dataset.has_annotations

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Example:
        return self._dataset[index]

    def image_sizes(self) -> np.ndarray:
        return self._dataset.image_sizes()

    def image_ids(self) -> list[int]:
        return self._dataset.image_ids()

    def image_name(self, index: int) -> str:
        return self._dataset.image_name(index)

    def categories(self) -> list[dict]:
        return self._dataset.categories()

    def ground_truth(self) -> dict:
        return self._dataset.ground_truth()


class Subset(View):
    """A range of a data set's images, as a data set.

    Args:
        dataset: the whole.
        start, stop: indices of the first image and of the one after the last.

    Raises:
        InputError: if the range is empty or reaches beyond the data set.
    """

    def __init__(self, dataset: Dataset, start: int, stop: int):
        if not 0 <= start < stop <= len(dataset):
            raise InputError(f"{dataset.name} has {len(dataset)} images; there is no range from {start} to {stop}")
        super().__init__(dataset)
        self.name, self.fingerprint = f"{self.name}[{start}:{stop}]", f"{self.fingerprint}[{start}:{stop}]"
        self._range = range(start, stop)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: int) -> Example:
        return self._dataset[self._range[index]]

    def image_sizes(self) -> np.ndarray:
        return self._dataset.image_sizes()[self._range.start : self._range.stop]

    def image_ids(self) -> list[int]:
        return self._dataset.image_ids()[self._range.start : self._range.stop]

    def image_name(self, index: int) -> str:
        return self._dataset.image_name(self._range[index])

    def ground_truth(self) -> dict:
        chosen = set(self.image_ids())
        whole = self._dataset.ground_truth()
        return whole | {
            "images": [image for image in whole["images"] if image["id"] in chosen],
            "annotations": [a for a in whole["annotations"] if a["image_id"] in chosen],
        }


def digest(*parts: bytes | str) -> str:
    """A short hash of texts and bytes, for fingerprints."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()[:16]
