"""Options that several commands have, for their `Arguments`: as a base class, or in fields with `OmitArgPrefixes`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jax.numpy as jnp

import detr_jax
from detr_jax.data.classes import read_table, with_classes
from detr_jax.data.dataset import Dataset
from detr_jax.data.registry import open_dataset
from detr_jax.errors import InputError
from detr_jax.kernels import IMPLEMENTATIONS, Execution
from detr_jax.methods import executed
from detr_jax.models import Detector, Selectors

if TYPE_CHECKING:
    Implementation = str
else:
    Implementation = Literal["plan", "masked", "auto", *IMPLEMENTATIONS]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The detector that a command uses."""

    model: str = "detr-tiny"
    """Name of a detector, hub id, or path of a checkpoint."""
    preset: str | None = None
    """Architecture of a checkpoint that does not say which it is, e.g. detr-r50."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the detector's computation; gates are float32."""
    size: tuple[int, int] | tuple[int] | None = None
    """Shorter side of resized images, and a cap on the longer one, in pixels; default as the detector was trained."""

    def load(self, labels: Sequence[str] | None = None) -> Detector:
        """The dense detector; arguments and errors as of `detr_jax.load` and `Preprocessing.with_size`."""
        detector = detr_jax.load(self.model, self.preset, jnp.dtype(self.dtype), labels=labels)
        if self.size is not None:
            detector.config = replace(detector.config, preprocessing=detector.preprocessing.with_size(*self.size))
        return detector

    def load_sparse(self, plan: str) -> detr_jax.SparseDETR:
        """The detector with a plan; errors as of `load` and `detr_jax.load_sparse`."""
        return detr_jax.load_sparse(self.load(), plan)


@dataclass(frozen=True)
class DataOptions:
    """The data set that a command uses."""

    data: str = "scenes"
    """scenes for generated ones, scenes:256 for those of 256 pixels a side, coco:PATH for a folder in COCO's layout or
    an export of Roboflow, CVAT, Label Studio, images:PATH for a folder of photographs that have no annotations."""
    coco: Path | None = None
    """Short for --data coco:PATH."""
    classes: tuple[str, ...] = ()
    """Categories of the data that the detector knows by another name, as NAME_IN_DATA=NAME_IN_DETECTOR, or a JSON file
    of such pairs; the others are matched by name."""

    @property
    def name(self) -> str:
        """Name of the data set, for `detr_jax.open_dataset`; an InputError if both options are given."""
        if self.coco is None:
            return self.data
        if self.data != "scenes":
            raise InputError(
                f"--coco {self.coco} is short for --data coco:{self.coco}; --data {self.data} is given too"
            )
        return f"coco:{self.coco}"

    @property
    def generated(self) -> bool:
        """True for scenes, whose training images have no end; errors as of `name`."""
        return self.name.partition(":")[0] == "scenes"

    def open(self, split: str, images: int | None = None) -> Dataset:
        """A split of it; arguments and errors as of `detr_jax.open_dataset`."""
        return open_dataset(self.name, split, images)

    def matched(self, labels: Sequence[str], *datasets: Dataset) -> list[Dataset]:
        """Data sets with a detector's classes as categories; prints how, once if it is the same for all.

        Errors as of `detr_jax.data.classes.with_classes` and `read_table`.
        """
        table = read_table(self.classes)
        found = [with_classes(dataset, labels, table) for dataset in datasets]
        for text in dict.fromkeys(str(mapping) for _, mapping in found if mapping.categories):
            print(text)
        return [dataset for dataset, _ in found]


@dataclass(frozen=True)
class ExecutionOptions:
    """Computation of FFNs whose selectors leave groups out."""

    implementation: Implementation = "plan"
    """plan is the plan's own; masked computes everything and ignores what is not selected; the others leave it out;
    auto is the fastest of them on this device."""
    tile_size: int | None = None
    """Tokens that share what is computed; default all of an image. Not for plan and masked."""
    block_size: int | None = None
    """Neurons that are computed together; default a group, or the smallest number of groups that the implementation
    takes. Not for plan and masked."""
    per_token_mask: bool = False
    """Compute for each token of a tile its own groups only, instead of all that the tile needs. Not for plan and
    masked."""
    sort_tokens: bool = False
    """Bring tokens that need the same groups together into tiles, and back afterwards. Not for plan and masked."""

    def of(self, selectors: Selectors) -> Selectors:
        """The selectors, computed in this way; an InputError if the implementation lacks an option that is given."""
        if self.implementation in ("plan", "masked"):
            if self != ExecutionOptions(self.implementation):
                raise InputError(
                    "--tile-size, --block-size, --per-token-mask and --sort-tokens need an --implementation that "
                    f"leaves groups out: auto or {', '.join(IMPLEMENTATIONS)}, not {self.implementation}"
                )
            return selectors if self.implementation == "plan" else executed(selectors, None)
        named = None if self.implementation == "auto" else self.implementation
        execution = Execution(self.tile_size, self.block_size, self.per_token_mask, self.sort_tokens, named)
        return executed(selectors, execution)
