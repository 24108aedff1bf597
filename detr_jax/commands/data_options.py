"""Command-line options that name a data set."""

from dataclasses import dataclass
from pathlib import Path

from detr_jax.data.dataset import Dataset
from detr_jax.data.registry import open_dataset
from detr_jax.errors import InputError


@dataclass(frozen=True)
class DataOptions:
    """The data set that a command uses. Annotate the field with `tyro.conf.OmitArgPrefixes`."""

    data: str = "scenes"
    """scenes for generated ones, coco:PATH for a folder in COCO's layout, images:PATH for a folder of photographs that
    have no annotations."""
    coco: Path | None = None
    """Folder with train2017/, val2017/ and annotations/; short for --data coco:PATH."""

    @property
    def name(self) -> str:
        """Name of the data set, for `detr_jax.open_dataset`.

        Raises:
            InputError: if both options are given.
        """
        if self.coco is None:
            return self.data
        if self.data != "scenes":
            raise InputError(
                f"--coco {self.coco} is short for --data coco:{self.coco}; --data {self.data} is given too"
            )
        return f"coco:{self.coco}"

    def open(self, split: str, images: int | None = None) -> Dataset:
        """A split of it; arguments and errors as of `detr_jax.open_dataset`."""
        return open_dataset(self.name, split, images)
