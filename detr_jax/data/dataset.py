"""The data set protocol: indexed examples, and their ground truth in COCO's format."""

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from detr_jax.errors import InputError

Json = dict[str, Any]
"""An entry of a file in COCO's layout, or such a file."""


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
    """Whether there are annotated objects; without, AP is undefined."""

    @property
    def fingerprint(self) -> str:
        """Equal for the same images and annotations, wherever they are."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def image_sizes(self) -> np.ndarray:
        """(images, 2) int, height and width of every image, known without reading it."""

    def image_ids(self) -> list[int]:
        """Ids of the images in index order."""

    def image_name(self, index: int) -> str:
        """Name of an image, for messages."""

    def categories(self) -> list[Json]:
        """`id` and `name` of every category of the ground truth, which need not be made for that."""

    def ground_truth(self) -> Json:
        """Annotations in the layout of COCO's `instances_*.json`; empty lists without any."""


class Subset:
    """The images of a data set from index `start` to before `stop`, as a data set.

    Raises:
        InputError: if the range is empty or reaches beyond the data set.
    """

    def __init__(self, dataset: Dataset, start: int, stop: int):
        if not 0 <= start < stop <= len(dataset):
            raise InputError(f"{dataset.name} has {len(dataset)} images; there is no range from {start} to {stop}")
        self._dataset, self.has_annotations = dataset, dataset.has_annotations
        self.name, self.fingerprint = (f"{text}[{start}:{stop}]" for text in (dataset.name, dataset.fingerprint))
        self._indices, self._slice = range(start, stop), slice(start, stop)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._dataset[self._indices[index]]

    def image_sizes(self) -> np.ndarray:
        return self._dataset.image_sizes()[self._slice]

    def image_ids(self) -> list[int]:
        return self._dataset.image_ids()[self._slice]

    def image_name(self, index: int) -> str:
        return self._dataset.image_name(self._indices[index])

    def categories(self) -> list[Json]:
        return self._dataset.categories()

    def ground_truth(self) -> Json:
        chosen, whole = set(self.image_ids()), self._dataset.ground_truth()
        images = [image for image in whole["images"] if image["id"] in chosen]
        annotations = [a for a in whole["annotations"] if a["image_id"] in chosen]
        return whole | {"images": images, "annotations": annotations}


def digest(*parts: bytes | str) -> str:
    """A short hash of texts and bytes, for fingerprints."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()[:16]
