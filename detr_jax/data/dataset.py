"""What every source of images looks like: indexed examples, and their ground truth in COCO's format."""

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

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def image_sizes(self) -> np.ndarray:
        """(images, 2) int, height and width of every image, known without reading the image."""
        ...

    def image_ids(self) -> list[int]:
        """Ids of the images in index order."""
        ...

    def ground_truth(self) -> dict:
        """The annotations as a dictionary in the layout of COCO's `instances_*.json`."""
        ...


class Subset:
    """A range of a data set's images, as a data set.

    Args:
        dataset: the whole.
        start, stop: indices of the first image and of the one after the last.

    Raises:
        ValueError: if the range is empty or reaches beyond the data set.
    """

    def __init__(self, dataset: Dataset, start: int, stop: int):
        if not 0 <= start < stop <= len(dataset):
            raise InputError(f"{dataset.name} has {len(dataset)} images; there is no range from {start} to {stop}")
        self.name = f"{dataset.name}[{start}:{stop}]"
        self._dataset = dataset
        self._range = range(start, stop)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: int) -> Example:
        return self._dataset[self._range[index]]

    def image_sizes(self) -> np.ndarray:
        return self._dataset.image_sizes()[self._range.start : self._range.stop]

    def image_ids(self) -> list[int]:
        return self._dataset.image_ids()[self._range.start : self._range.stop]

    def ground_truth(self) -> dict:
        chosen = set(self.image_ids())
        whole = self._dataset.ground_truth()
        return whole | {
            "images": [image for image in whole["images"] if image["id"] in chosen],
            "annotations": [a for a in whole["annotations"] if a["image_id"] in chosen],
        }
