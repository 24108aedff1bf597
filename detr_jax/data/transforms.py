"""Pixels as a detector takes them: resized, rescaled, normalised, padded."""

from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np
from PIL import Image

from detr_jax.models import Preprocessing

Pixels = TypeVar("Pixels", np.ndarray, jax.Array)


def normalise(image: Pixels, preprocessing: Preprocessing) -> Pixels:
    """(..., 3) uint8 RGB -> float32, rescaled, with mean and standard deviation taken out."""
    mean, std = (np.array(of_channels, np.float32) for of_channels in (preprocessing.mean, preprocessing.std))
    # Divided as the official code divides by 255: multiplied by 1 / 255 the last digit is another.
    return (image.astype(np.float32) / np.float32(1 / preprocessing.rescale) - mean) / std


def preprocess(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """(height, width, 3) uint8 RGB -> (resized height, resized width, 3) float32, normalised."""
    height, width = preprocessing.resized_size(image.shape[:2])
    resized = Image.fromarray(image).resize((width, height), Image.Resampling[preprocessing.resample.upper()])
    return normalise(np.asarray(resized), preprocessing)


def pad(images: Sequence[np.ndarray], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Images (height, width, 3) in the top left corners of one size.

    Returns:
        `(images, *size, 3)` float32, zero where there is padding, and `(images, *size)` bool, true where the image is.
    """
    pixel_values = np.zeros((len(images), *size, 3), np.float32)
    pixel_mask = np.zeros(pixel_values.shape[:3], bool)
    for values, mask, image in zip(pixel_values, pixel_mask, images, strict=True):
        height, width, _ = image.shape
        values[:height, :width], mask[:height, :width] = image, True
    return pixel_values, pixel_mask
