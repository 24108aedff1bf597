"""Preprocessing of the official DETR: resize to a shorter side under a cap on the longer one, then normalise."""

import jax
import numpy as np
from PIL import Image

from detr_jax.errors import InputError
from detr_jax.models import DetrConfig

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


def resized_size(size: tuple[int, int], shortest: int, longest: int) -> tuple[int, int]:
    """Size of an image after resizing, rounded as the official `get_size_with_aspect_ratio` does.

    Args:
        size: (height, width) in pixels.
        shortest: wanted shorter side.
        longest: cap on the longer side; rounding the shorter side can exceed it by a few pixels.

    Raises:
        ValueError: if the image is so elongated that under the cap nothing of its shorter side is left.
    """
    height, width = int(size[0]), int(size[1])
    low, high = min(height, width), max(height, width)
    if high / low * shortest > longest:
        shortest = round(longest * low / high)
        if shortest == 0:
            raise InputError(f"an image of {width}x{height} pixels is too elongated for a longer side of {longest}")
    if low == shortest:
        return height, width
    if width < height:
        return int(shortest * height / width), shortest
    return shortest, int(shortest * width / height)


def normalise(image: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """(..., 3) uint8 RGB -> float32 with ImageNet's mean and standard deviation taken out."""
    return (image.astype(np.float32) / 255 - MEAN) / STD


def preprocess(image: np.ndarray, config: DetrConfig) -> np.ndarray:
    """What a detector sees of an image.

    Args:
        image: (height, width, 3) uint8, RGB.
        config: says how large images are.

    Returns:
        (resized height, resized width, 3) float32.
    """
    height, width = resized_size(image.shape[:2], config.shortest_side, config.longest_side)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return normalise(np.asarray(resized))
