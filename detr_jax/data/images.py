"""Pixels of image files, PIL images and arrays."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import ExifTags, Image

from detr_jax.errors import InputError, InputTypeError, MissingFileError

_TURNS = "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"
_UPRIGHT = {orientation: Image.Transpose[name] for orientation, name in enumerate(_TURNS, 2)}
"""EXIF orientation -> operation that makes the image upright."""


def read_image(path: Path) -> tuple[np.ndarray, int]:
    """(height, width, 3) uint8 RGB pixels of a file as stored, and its EXIF orientation, 1 for an upright image.

    As in torchvision's `CocoDetection`, pixels are not rotated, because annotations refer to stored ones; grey, palette
    and CMYK become RGB, transparency is dropped. Deeper grey images are refused, which PIL would clip to white.

    Raises:
        MissingFileError: if there is no such file.
        InputError: if it is not an image, is damaged, or has more than 8 bits per grey value.
    """
    with _opened(path) as image:
        return _rgb(image), _orientation(image)


def pixels(image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8 RGB pixels; files and PIL images are made upright where their EXIF data ask for it.

    Raises:
        MissingFileError: if there is no such file.
        InputTypeError: if it is neither a file nor a PIL image nor an array.
        InputError: if it is a file and not an image, or an array of another shape or type.
    """
    if isinstance(image, str | Path):
        with _opened(Path(image)) as opened:
            return pixels(opened)
    if isinstance(image, Image.Image):
        turn = _UPRIGHT.get(_orientation(image))
        return _rgb(image if turn is None else image.transpose(turn))
    return _checked(image)


def pixels_size(image: str | Path | Image.Image | np.ndarray) -> tuple[int, int]:
    """(height, width) of what `pixels` returns, without decoding files; raises the same."""
    if isinstance(image, str | Path):
        with _opened(Path(image)) as opened:
            return pixels_size(opened)
    if isinstance(image, Image.Image):
        return (image.width, image.height) if is_sideways(_orientation(image)) else (image.height, image.width)
    return _checked(image).shape[:2]


def is_sideways(orientation: int) -> bool:
    """Whether an EXIF orientation exchanges height and width."""
    return orientation in (5, 6, 7, 8)


def _orientation(image: Image.Image) -> int:
    # PIL turns TIFF files itself. Of PNG files, `getexif` decodes the pixels where no EXIF data come before them.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    return image.getexif().get(ExifTags.Base.Orientation, 1)


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
