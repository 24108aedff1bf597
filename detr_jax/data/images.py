"""Pixels of images: of files, of PIL images, of arrays."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from detr_jax.errors import InputError, InputTypeError, MissingFileError


def read_image(path: Path) -> np.ndarray:
    """(height, width, 3) uint8 RGB pixels of an image file.

    Pixels are taken as torchvision's `CocoDetection` takes them: as they are stored, without the rotation that EXIF
    data may ask for, because annotations refer to stored pixels; grey, palette and CMYK become RGB, transparency is
    dropped. Only deeper grey images differ: PIL would clip them to 8 bits, which turns most of them white.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an image, is damaged, or has more than 8 bits per grey value.
    """
    with _opened(path) as image:
        return _rgb(image)


def read_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image file, from its header.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an image.
    """
    with _opened(path) as image:
        return image.height, image.width


def pixels(image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8 RGB pixels of a file (see `read_image`), a PIL image or an array.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: if it is none of these.
        ValueError: if it is a file and not an image, or an array of another shape or type.
    """
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return _rgb(image)
    return _checked(image)


def pixels_size(image: str | Path | Image.Image | np.ndarray) -> tuple[int, int]:
    """(height, width) of what `pixels` takes, without decoding files; raises the same."""
    if isinstance(image, str | Path):
        return read_size(Path(image))
    if isinstance(image, Image.Image):
        return image.height, image.width
    height, width, _ = _checked(image).shape
    return height, width


def _checked(image: Any) -> np.ndarray:
    if not isinstance(image, np.ndarray | jax.Array):
        raise InputTypeError(f"an image is a file, a PIL image or an array, not {image!r:.50}")
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or not image.size:
        raise InputError(
            f"an image as an array is (height, width, 3) uint8, red, green, blue; got {image.dtype} {image.shape}"
        )
    return np.asarray(image)


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith(("I", "F")):
        raise InputError(
            f"the grey values (mode {image.mode}) of this image have more than 8 bits; convert it to 8 bits first"
        )
    return np.asarray(image.convert("RGB"))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise MissingFileError(f"there is no image {path}") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise InputError(f"cannot read {path} as an image: {error}") from error
