"""What every source of images looks like: indexed examples, and their ground truth in COCO's format."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


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
