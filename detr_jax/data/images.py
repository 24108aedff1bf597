"""Opening image files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image


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
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"its grey values (mode {image.mode}) have more than 8 bits; save it with 8 bits first")
        return np.asarray(image.convert("RGB"))


def read_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image file, from its header.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an image.
    """
    with _opened(path) as image:
        return image.height, image.width


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image {path}") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise ValueError(f"cannot read {path} as an image: {error}") from error
