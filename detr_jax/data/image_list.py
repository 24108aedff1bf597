"""Images without annotations as a data set, and as one batch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from detr_jax.data.dataset import Example
from detr_jax.data.images import pixels, pixels_size
from detr_jax.data.transforms import preprocess
from detr_jax.errors import InputError
from detr_jax.models import DetrConfig

ImageLike = str | Path | Image.Image | np.ndarray
"""A file, a PIL image, or (height, width, 3) uint8 RGB."""


class GivenImages:
    """Images that somebody names or has; the id of an image is its index.

    Raises:
        FileNotFoundError: if a file does not exist.
        TypeError: if something is no image at all.
        ValueError: if a file is not an image, or an array has another shape or type than an image.
    """

    name = "images"

    def __init__(self, images: Sequence[ImageLike]):
        self._images = images
        self._sizes = np.array([pixels_size(image) for image in images]).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        return Example(index, pixels(self._images[index]), np.zeros((0, 4), np.float32), np.zeros(0, np.int32))

    def image_sizes(self) -> np.ndarray:
        return self._sizes

    def image_ids(self) -> list[int]:
        return list(range(len(self)))

    def ground_truth(self) -> dict:
        images = [{"id": i, "height": int(h), "width": int(w)} for i, (h, w) in enumerate(self._sizes)]
        return {"images": images, "annotations": [], "categories": []}


def preprocess_images(images: ImageLike | Sequence[ImageLike], config: DetrConfig) -> tuple[np.ndarray, np.ndarray]:
    """What a detector sees of one or more images: resized, normalised, and padded to the largest of them.

    Args:
        images: files, PIL images or (height, width, 3) uint8 arrays, one or many.
        config: of the detector.

    Returns:
        `pixel_values` (batch, height, width, 3) float32 and `pixel_mask` (batch, height, width) bool, for calls.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `GivenImages`; also where there are no images.

    >>> import detr_jax, numpy as np
    >>> config = detr_jax.preset_config("detr-tiny")
    >>> pixel_values, pixel_mask = detr_jax.preprocess_images(np.zeros((256, 384, 3), np.uint8), config)
    >>> pixel_values.shape, pixel_mask.all()
    ((1, 128, 192, 3), np.True_)
    """
    resized = [preprocess(pixels(image), config) for image in as_list(images)]
    if not resized:
        raise InputError("there are no images to preprocess")
    size = np.max([image.shape[:2] for image in resized], axis=0)
    pixel_values = np.zeros((len(resized), *size, 3), np.float32)
    pixel_mask = np.zeros(pixel_values.shape[:3], bool)
    for i, image in enumerate(resized):
        height, width, _ = image.shape
        pixel_values[i, :height, :width] = image
        pixel_mask[i, :height, :width] = True
    return pixel_values, pixel_mask


def as_list(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    """One or many images as a list."""
    return list(images) if is_many(images) else [images]


def is_many(images: ImageLike | Sequence[ImageLike]) -> bool:
    """Whether these are many images, if only in form: a list, a tuple, or an array with an axis for them."""
    return isinstance(images, list | tuple) or getattr(images, "ndim", 3) == 4
