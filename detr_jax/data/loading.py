"""Batches of preprocessed images in a few padded shapes, loaded while the last ones are computed."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from detr_jax.data.dataset import Dataset
from detr_jax.data.prefetch import prefetch, processes_for
from detr_jax.data.transforms import pad, preprocess
from detr_jax.errors import InputError
from detr_jax.mesh import local_slice
from detr_jax.models import Preprocessing

LONG_SIDES = 5
"""Lengths of the longer side, from square to the cap; a program is compiled for each of them and orientation."""
COARSE_STEP = 256
"""Pixels between lengths of the sides where images are not resized."""


@dataclass(frozen=True)
class BatchLayout:
    """Indices in the data set of a batch's images, at most `shape[0]`, and its shape (batch, height, width)."""

    indices: tuple[int, ...]
    shape: tuple[int, int, int]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Images in the top left corners of one shape, and their objects.

    Where images ran out, the batch is filled up with copies of its first one, which have no `boxes` and `labels`. Each
    of several hosts that share a batch has pixels and objects of its own images only.

    Attributes:
        pixel_values: (own, height, width, 3) float32, zero where there is padding.
        pixel_mask: (own, height, width) bool, true where the image is.
        sizes: (batch, 2) int, original height and width in pixels.
        image_ids: (batch,) int.
        valid: (batch,) bool, false for copies.
        boxes: (objects, 4) float32 for each valid own image, (x0, y0, x1, y1) in original pixels.
        labels: (objects,) int32 for each valid own image.
        first: index in the batch of the first own image.
    """

    pixel_values: np.ndarray
    pixel_mask: np.ndarray
    sizes: np.ndarray
    image_ids: np.ndarray
    valid: np.ndarray
    boxes: tuple[np.ndarray, ...]
    labels: tuple[np.ndarray, ...]
    first: int = field(default=0, metadata={"static": True})

    @property
    def own(self) -> slice:
        """The images of the batch that are this host's: all, where there is one host."""
        return slice(self.first, self.first + len(self.pixel_values))


def padded_size(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Padded (height, width) of an image that was resized to `size`, multiples of the stride.

    The shorter side is the detector's; the longer one has one of `LONG_SIDES` lengths, unless the official rounding
    exceeds the cap. Where the sides have but one limit, each side has one of `LONG_SIDES` lengths up to it, and where
    they have none, they are multiples of `COARSE_STEP`.
    """
    shortest, longest, stride = preprocessing.shortest_side, preprocessing.longest_side, preprocessing.stride
    if preprocessing.has_sides and shortest < longest:
        long_sides = np.linspace(shortest, longest, LONG_SIDES)
        sides = np.ceil(np.array([*long_sides, max(size)]) / stride).astype(int) * stride
        short, long = int(sides[0]), int(sides[sides >= max(size)][0])
        return (short, long) if size[0] <= size[1] else (long, short)
    one_limit = {"fit": preprocessing.box, "stretch": (LONG_SIDES,) * 2, "none": (COARSE_STEP * LONG_SIDES,) * 2}
    limits = one_limit.get(preprocessing.resize, (longest, longest))
    steps_of = [-(-limit // LONG_SIDES) for limit in limits]
    height, width = (
        preprocessing.to_stride(-(-side // step) * step) for side, step in zip(size, steps_of, strict=True)
    )
    return height, width


def layout_batches(
    sizes: np.ndarray,
    preprocessing: Preprocessing,
    batch_size: int,
    *,
    exact: bool = False,
    shuffle_seed: int | None = None,
    epoch: int = 0,
    image_name: Callable[[int], str] = "image {}".format,
) -> list[BatchLayout]:
    """Images in batches of one shape each; the number of batches does not depend on the shuffle.

    Args:
        sizes: (images, 2), height and width of the original images.
        exact: no padding and no copies: every size of image is a shape of its own.
        shuffle_seed: order images and batches by this seed and the epoch; None keeps the order within a shape.
        image_name: name of an image by its index, for errors.

    Raises:
        InputError: if the batch size is not positive, or an image is too elongated.
    """
    if batch_size < 1:
        raise InputError(f"a batch needs at least one image, not {batch_size}")
    rng = None if shuffle_seed is None else np.random.default_rng([shuffle_seed, epoch])
    order = range(len(sizes)) if rng is None else rng.permutation(len(sizes)).tolist()

    by_shape = defaultdict(list)
    for index in order:
        try:
            size = preprocessing.resized_size(sizes[index])
        except InputError as error:
            raise InputError(f"{image_name(index)}: {error}") from None
        by_shape[size if exact else padded_size(size, preprocessing)].append(index)

    layouts = []
    for shape, indices in by_shape.items():
        for first in range(0, len(indices), batch_size):
            chunk = tuple(indices[first : first + batch_size])
            layouts.append(BatchLayout(chunk, (len(chunk) if exact else batch_size, *shape)))
    return layouts if rng is None else [layouts[i] for i in rng.permutation(len(layouts))]


def load_batch(
    dataset: Dataset, preprocessing: Preprocessing, layout: BatchLayout, sizes: np.ndarray, ids: np.ndarray, rows: slice
) -> Batch:
    """The images in some rows of a batch, read and preprocessed; `sizes` (images, 2), `ids` are of the data set."""
    filled = np.array(layout.indices + layout.indices[:1] * (layout.shape[0] - len(layout.indices)))
    valid = np.arange(layout.shape[0]) < len(layout.indices)
    own = filled[rows].tolist()
    examples = {index: dataset[index] for index in dict.fromkeys(own)}
    preprocessed = {index: preprocess(example.image, preprocessing) for index, example in examples.items()}
    pixel_values, pixel_mask = pad([preprocessed[index] for index in own], layout.shape[1:])
    no_copies = [examples[index] for index in filled[rows][valid[rows]].tolist()]
    boxes, labels = tuple(example.boxes for example in no_copies), tuple(example.labels for example in no_copies)
    return Batch(pixel_values, pixel_mask, sizes[filled], ids[filled], valid, boxes, labels, rows.start)


def batches(
    dataset: Dataset,
    preprocessing: Preprocessing,
    batch_size: int,
    *,
    exact: bool = False,
    shuffle_seed: int | None = None,
    epoch: int = 0,
    start: int = 0,
    mesh: Mesh | None = None,
    processes: int | None = None,
) -> Iterator[Batch]:
    """One pass over a data set, loaded in the background.

    Args:
        batch_size: images per batch, over all devices.
        exact, shuffle_seed, epoch: see `layout_batches`, which also tells how many batches a pass has.
        start: index of the first batch, to resume a pass.
        mesh: devices that share every batch, see `detr_jax.mesh`.
        processes: number that load, 0 for threads of this one; None chooses by the number of images and of CPU cores.

    Raises:
        ValueError: if the batch size is not positive, the devices cannot share a batch, or the pass has fewer than
            `start` batches.
    """
    sizes, ids = dataset.image_sizes(), np.array(dataset.image_ids())
    order: dict[str, Any] = {"shuffle_seed": shuffle_seed, "epoch": epoch, "image_name": dataset.image_name}
    layouts = layout_batches(sizes, preprocessing, batch_size, exact=exact, **order)
    if not 0 <= start <= len(layouts):
        raise ValueError(f"cannot start at batch {start} of {len(layouts)}")
    layouts = layouts[start:]
    rows = {size: local_slice(mesh, size) for size in {layout.shape[0] for layout in layouts}}

    def load(layout: BatchLayout) -> Batch:
        return load_batch(dataset, preprocessing, layout, sizes, ids, rows[layout.shape[0]])

    if processes is None and layouts:
        shapes = [(len(range(size)[rows[size]]), height, width) for size, height, width in (x.shape for x in layouts)]
        largest = max(map(math.prod, shapes))
        processes = processes_for(sum(images for images, *_ in shapes), 3 * np.dtype(np.float32).itemsize * largest)
    return prefetch(layouts, load, processes or 0)
