"""Images without annotations as a data set, and as one batch."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeGuard, cast

import numpy as np
from PIL import Image

from detr_jax.data.dataset import Example, Json, digest
from detr_jax.data.images import pixels, pixels_size
from detr_jax.data.transforms import pad, preprocess
from detr_jax.errors import InputError, MissingFileError
from detr_jax.models import Preprocessing

ImageLike = str | Path | Image.Image | np.ndarray
"""A file, a PIL image, or an array (height, width, 3) uint8 RGB."""
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Suffixes of the files that are taken from a folder of images."""


class GivenImages:
    """Images without annotations, as files or in memory; the id of an image is its index unless ids are given.

    Raises:
        MissingFileError: if a file does not exist.
        InputTypeError: if something is no image at all.
        InputError: if a file is not an image, or an array has another shape or type than an image.
    """

    name = "images"
    has_annotations = False

    def __init__(self, images: Sequence[ImageLike], ids: Sequence[int] | None = None):
        self._images = images
        self._ids = list(range(len(images))) if ids is None else list(ids)
        self._sizes = np.array([pixels_size(image) for image in images]).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        image = pixels(self._images[index])
        return Example(self._ids[index], image, np.zeros((0, 4), np.float32), np.zeros(0, np.int32))

    @cached_property
    def fingerprint(self) -> str:
        return digest(*(self._identity(index) for index in range(len(self))), self._sizes.tobytes())

    def _identity(self, index: int) -> str | bytes:
        image = self._images[index]
        return Path(image).name if isinstance(image, str | Path) else pixels(image).tobytes()

    def image_sizes(self) -> np.ndarray:
        return self._sizes

    def image_ids(self) -> list[int]:
        return list(self._ids)

    def image_name(self, index: int) -> str:
        image = self._images[index]
        return str(image) if isinstance(image, str | Path) else f"image {index}"

    def categories(self) -> list[Json]:
        return []

    def ground_truth(self) -> Json:
        sizes = zip(self._ids, self._sizes.tolist(), strict=True)
        images = [{"id": id, "height": height, "width": width} for id, (height, width) in sizes]
        return {"images": images, "annotations": [], "categories": []}


class ImageFolder(GivenImages):
    """Photographs in a folder and the folders in it, in the order of their names, without annotations.

    Where the folder holds `train/` or `val/`, these are the splits. Otherwise every fifth image is in "val" and the
    others are in "train". "all" is everything. The id of an image is its position among all images. Files with other
    suffixes than `SUFFIXES` and hidden ones are left out.

    Args:
        images: use the first so many images of the split only.

    Raises:
        MissingFileError: if there is no such folder.
        InputError: if there is no such split, it has too few images, or a file is not an image.
    """

    def __init__(self, root: Path, split: str, images: int | None = None):
        if split not in (splits := ("train", "val", "all")):
            raise InputError(f"a folder of images has the splits {', '.join(splits)}, not {split!r}")
        if not root.is_dir():
            raise MissingFileError(f"there is no folder {root} with images")
        paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        names = [path.relative_to(root).parts for path in paths if path.is_file()]
        if split == "all":
            chosen = list(range(len(names)))
        elif any((root / part).is_dir() for part in ("train", "val")):
            chosen = [i for i, parts in enumerate(names) if parts[0] == split and len(parts) > 1]
        else:
            chosen = [i for i in range(len(names)) if (i % 5 == 4) == (split == "val")]
        if not 0 < (len(chosen) if images is None else images) <= len(chosen):
            asked = "" if images is None else f", asked for {images}"
            raise InputError(f"{root} has {len(chosen)} images ({', '.join(SUFFIXES)}) for the split {split}{asked}")
        chosen = chosen[:images]
        self._root, self.name = root, f"{root.name}-{split}"
        super().__init__([root.joinpath(*names[i]) for i in chosen], chosen)

    def _identity(self, index: int) -> str:
        path = Path(self.image_name(index))
        return f"{path.relative_to(self._root).as_posix()} {path.stat().st_size}"


def preprocess_images(
    images: ImageLike | Sequence[ImageLike], preprocessing: Preprocessing
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of a detector: one or more images resized, normalised, and padded to the largest of them.

    Args:
        images: files, PIL images or (height, width, 3) uint8 arrays, one or many.
        preprocessing: `model.preprocessing` of the detector.

    Returns:
        `pixel_values` (batch, height, width, 3) float32 and `pixel_mask` (batch, height, width) bool.

    Raises:
        MissingFileError, InputTypeError, InputError: see `GivenImages`; also where there are no images.

    >>> import detr_jax, numpy as np
    >>> preprocessing = detr_jax.preset_config("detr-tiny").preprocessing
    >>> pixel_values, pixel_mask = detr_jax.preprocess_images(np.zeros((256, 384, 3), np.uint8), preprocessing)
    >>> pixel_values.shape, pixel_mask.all()
    ((1, 128, 192, 3), np.True_)
    """
    given = GivenImages(as_list(images))
    if not len(given):
        raise InputError("there are no images to preprocess")
    resized = []
    for index in range(len(given)):
        image = given[index].image
        try:
            resized.append(preprocess(image, preprocessing))
        except InputError as error:
            raise InputError(f"{given.image_name(index)}: {error}") from None
    return pad(resized, tuple(np.max([image.shape[:2] for image in resized], axis=0)))


def as_list(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    """One or many images as a list."""
    return list(images) if is_many(images) else [cast(ImageLike, images)]


def is_many(images: ImageLike | Sequence[ImageLike]) -> TypeGuard[Sequence[ImageLike]]:
    """Whether these are many images, if only in form: a list, a tuple, or an array with an axis for them."""
    return isinstance(images, list | tuple) or getattr(images, "ndim", 3) == 4
