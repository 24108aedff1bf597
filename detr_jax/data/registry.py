"""Data sets by name: "scenes", "coco:PATH", "images:PATH"."""

from collections.abc import Callable
from pathlib import Path

from detr_jax.data.coco import CocoDataset
from detr_jax.data.dataset import Dataset
from detr_jax.data.image_list import ImageFolder
from detr_jax.data.scenes import ScenesDataset
from detr_jax.errors import InputError

Opener = Callable[[str, str, int | None], Dataset]
"""(location, split, images) -> data set; the location is the text after the colon, empty without one."""

_OPENERS: dict[str, Opener] = {}


def register_dataset(name: str, opener: Opener) -> None:
    """Makes `open_dataset("name:location", ...)` call `opener(location, split, images)`.

    Raises:
        InputError: if the name is taken or has a colon.
    """
    if name in _OPENERS or ":" in name:
        raise InputError(f"a kind of data set cannot be named {name!r}: it has a colon or there is one already")
    _OPENERS[name] = opener


def open_dataset(data: str, split: str, images: int | None = None) -> Dataset:
    """A split of a data set.

    Args:
        data: "scenes" for generated scenes, "scenes:256" for those of 256 pixels a side, "coco:PATH" for a folder in
            COCO's layout or an export of Roboflow, CVAT or Label Studio, "images:PATH" for a folder of photographs
            without annotations, or a kind added by `register_dataset`.
        split: "train" or "val"; of scenes also "test"; of a "coco:" folder any that is there, see
            `detr_jax.data.coco_layouts.find_split`, and "all" where it is not divided; of a folder of photographs also
            "all".
        images: use the first so many images only.

    Raises:
        MissingFileError: if a folder or file does not exist.
        InputError: if there is no such kind of data set or split, or the data are damaged or too few.

    >>> import detr_jax
    >>> len(detr_jax.open_dataset("scenes", "val"))
    600
    """
    kind, _, location = data.partition(":")
    if kind not in _OPENERS:
        found = f"; for the folder {data} say coco:{data} or images:{data}" if Path(data).is_dir() else ""
        raise InputError(
            f"there is no data set {data!r}; known are {', '.join(_OPENERS)}, with a path as in coco:PATH{found}"
        )
    return _OPENERS[kind](location, split, images)


def _path(kind: str, location: str) -> Path:
    if not location:
        raise InputError(f"the data set {kind!r} needs a path: {kind}:PATH")
    return Path(location).expanduser()


def _scenes(location: str, split: str, images: int | None) -> Dataset:
    if not location:
        return ScenesDataset(split, images)
    if not location.isdecimal():
        raise InputError(f"scenes are generated and have no path, only a side, as in scenes:256; not {location!r}")
    return ScenesDataset(split, images, int(location))


register_dataset("scenes", _scenes)
register_dataset("coco", lambda location, split, images: CocoDataset(_path("coco", location), split, images))
register_dataset("images", lambda location, split, images: ImageFolder(_path("images", location), split, images))
