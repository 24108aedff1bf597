"""Choosing a data set by what a command line says."""

from pathlib import Path

from detr_jax.data.coco import CocoDataset
from detr_jax.data.dataset import Dataset
from detr_jax.data.scenes import ScenesDataset


def open_dataset(coco: Path | None, split: str, images: int | None = None) -> Dataset:
    """A split of a COCO folder, or of the generated scenes where no folder is given.

    Args:
        coco: folder of a data set in COCO's layout, or None for generated scenes.
        split: "train" or "val", of COCO the ones of 2017; or, of COCO, the full name of another split.
        images: use the first so many images only.

    Raises:
        FileNotFoundError, ValueError: as `CocoDataset` and `ScenesDataset` do.
    """
    if coco is None:
        return ScenesDataset(split, images=images)
    return CocoDataset(coco, {"train": "train2017", "val": "val2017"}.get(split, split), images=images)
