"""The two COCO images of the golden arrays, as detectors take them."""

import dataclasses
from pathlib import Path

import numpy as np

from detr_jax import DetrConfig
from detr_jax.data.images import pixels as pixels_of
from detr_jax.data.transforms import preprocess

IMAGES = tuple(Path(__file__).parent / "data" / name for name in ("000000000139.jpg", "000000000802.jpg"))


def small_images(config: DetrConfig) -> list[np.ndarray]:
    """Both images, each preprocessed to the golden arrays' small size."""
    preprocessing = dataclasses.replace(config.preprocessing, shortest_side=320, longest_side=480)
    return [preprocess(pixels_of(path), preprocessing) for path in IMAGES]


def padded(images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Images of different sizes padded at the bottom and right into one batch, and the mask of what is image."""
    size = np.max([image.shape[:2] for image in images], axis=0)
    pixels = np.zeros((len(images), *size, 3), np.float32)
    mask = np.zeros(pixels.shape[:3], bool)
    for index, image in enumerate(images):
        height, width = image.shape[:2]
        pixels[index, :height, :width] = image
        mask[index, :height, :width] = True
    return pixels, mask
