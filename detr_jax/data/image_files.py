"""Image files without annotations as a data set."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detr_jax.data.dataset import Example
from detr_jax.data.images import read_image, read_size


class ImageFiles:
    """Images by path; the id of an image is its index.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if a file is not an image.
    """

    name = "images"

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        self._sizes = np.array([read_size(path) for path in paths]).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Example:
        image = read_image(self._paths[index])
        return Example(index, image, np.zeros((0, 4), np.float32), np.zeros(0, np.int32))

    def image_sizes(self) -> np.ndarray:
        return self._sizes

    def image_ids(self) -> list[int]:
        return list(range(len(self)))

    def ground_truth(self) -> dict:
        images = [{"id": i, "height": int(h), "width": int(w)} for i, (h, w) in enumerate(self._sizes)]
        return {"images": images, "annotations": [], "categories": []}
