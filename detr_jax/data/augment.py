"""Batches for training: random views of images, as the official DETR draws them, in a few padded shapes."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from PIL import Image

from detr_jax.data.dataset import Dataset, Example
from detr_jax.data.loading import layout_batches
from detr_jax.data.prefetch import prefetch, processes_for
from detr_jax.data.transforms import normalise, pad
from detr_jax.errors import InputError
from detr_jax.mesh import local_slice, mesh_of, shard_batch
from detr_jax.models import Detector, Preprocessing
from detr_jax.models.detr.matching import Targets, padded_targets
from detr_jax.pytrees import pytree

Size = tuple[int, int]
"""(height, width) in pixels."""

Views = Literal["official", "mirrored", "whole"]
"""Random parts and sizes; whole images of the detector's own size, half of them mirrored; or none of them."""

# The official sizes as shares of the shorter side that the detector is evaluated with, which there is 800 pixels.
SCALES = tuple(pixels / 800 for pixels in range(480, 801, 32))
CROPPED_SCALES = tuple(pixels / 800 for pixels in (400, 500, 600))
"""Of images before a part of them is cut out."""
CROPS = (384 / 800, 600 / 800)
"""The smallest and the largest side of that part."""
NO_CAP = 2**31


@dataclass(frozen=True)
class View:
    """A part of an image, resized and perhaps mirrored.

    Attributes:
        box: (x0, y0, x1, y1), the part in pixels of the image.
        size: (height, width) after resizing.
        flipped: left and right change places.
    """

    box: tuple[float, float, float, float]
    size: Size
    flipped: bool

    def within(self, shape: Size) -> "View":
        """The same part, made smaller if it does not fit into a shape."""
        shrink = min(1.0, shape[0] / self.size[0], shape[1] / self.size[1])
        height, width = (max(1, int(side * shrink)) for side in self.size)
        return View(self.box, (height, width), self.flipped)

    def preprocess(self, image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
        """(height, width, 3) uint8 RGB -> `(*size, 3)` float32, resampled once and normalised."""
        resample = Image.Resampling[preprocessing.resample.upper()]
        resized = np.asarray(Image.fromarray(image).resize(self.size[::-1], resample, self.box))
        return normalise(resized[:, :: -1 if self.flipped else 1], preprocessing)

    def objects(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """Labels (objects,) and boxes (objects, 4) of what is in the part, (cx, cy, w, h) as fractions of it."""
        low, high = np.array(self.box[:2], np.float32), np.array(self.box[2:], np.float32)
        corners = (example.boxes.reshape(-1, 2, 2).clip(low, high) - low) / (high - low)
        centres, sizes = corners.mean(1), corners[:, 1] - corners[:, 0]
        if self.flipped:
            centres[:, 0] = 1 - centres[:, 0]
        inside = (sizes > 0).all(1)
        return example.labels[inside], np.concatenate([centres, sizes], axis=1)[inside]


def random_view(size: Size, preprocessing: Preprocessing, rng: np.random.Generator, views: Views = "official") -> View:
    """A view of an image of a size.

    The official one (Carion et al. 2020, `make_coco_transforms`) is mirrored or not; then whole, or a part that is cut
    out at a random scale; then resized to a random shorter side under the detector's cap on the longer one.
    """
    flipped, cropped = rng.random(2) < 0.5
    short = preprocessing.shortest_side
    height, width = size
    box = (0.0, 0.0, float(width), float(height))
    if views != "official":
        return View(box, preprocessing.resized_size(size), bool(flipped) and views == "mirrored")
    part = size
    if cropped:
        scale = round(short * rng.choice(CROPPED_SCALES))
        scaled = replace(preprocessing, shortest_side=scale, longest_side=NO_CAP).resized_size(size)
        low, high = (round(short * side) for side in CROPS)
        rows, columns = (int(rng.integers(min(low, side), min(side, high) + 1)) for side in scaled)
        top, left = int(rng.integers(0, scaled[0] - rows + 1)), int(rng.integers(0, scaled[1] - columns + 1))
        part = rows, columns
        y, x = height / scaled[0], width / scaled[1]  # pixels of the image
        box = (left * x, top * y, min((left + columns) * x, width), min((top + rows) * y, height))
    resized = replace(preprocessing, shortest_side=round(short * rng.choice(SCALES))).resized_size(part)
    return View(box, resized, bool(flipped))


def padded_sides(preprocessing: Preprocessing) -> list[int]:
    """Heights and widths of padded batches, in ascending order, multiples of the stride.

    On COCO a finer division into 11 shapes instead of 5 would save an eighth of the pixels.
    """
    short, long = preprocessing.shortest_side, preprocessing.longest_side
    return sorted({preprocessing.to_stride(side) for side in (short, (short + long) // 2, long)})


@dataclass(frozen=True)
class ViewsLayout:
    """Indices in the data set of a batch's images, their views, and the padded shape that holds these."""

    indices: tuple[int, ...]
    views: tuple[View, ...]
    shape: Size


def layout_views(
    sizes: np.ndarray, preprocessing: Preprocessing, batch_size: int, seed: int, epoch: int, views: Views = "official"
) -> list[ViewsLayout]:
    """Views of the images `sizes` (images, 2) in full batches of similar ones; a random remainder is left out.

    No shape is long both ways, so that memory is bounded: where wide and high views meet in a batch, the high ones are
    made smaller.
    """
    sides = np.array(padded_sides(preprocessing))
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(sizes))[: len(sizes) // batch_size * batch_size]
    drawn, shapes = {}, {}
    for index in order.tolist():
        own = np.random.default_rng([seed, epoch, index])
        drawn[index] = view = random_view(tuple(sizes[index].tolist()), preprocessing, own, views)
        shapes[index] = sides[np.minimum(np.searchsorted(sides, view.size), len(sides) - 1)]
    by_shape = sorted(order.tolist(), key=lambda index: (shapes[index][1] - shapes[index][0], shapes[index][0]))
    layouts = []
    for first in range(0, len(by_shape), batch_size):
        indices = by_shape[first : first + batch_size]
        height, width = np.max([shapes[index] for index in indices], axis=0).tolist()
        shape = (int(sides[0]) if width > sides[0] else height, width)
        layouts.append(ViewsLayout(tuple(indices), tuple(drawn[index].within(shape) for index in indices), shape))
    return [layouts[i] for i in rng.permutation(len(layouts))]


@pytree
class TrainingBatch:
    """Views of images in the top left corners of one shape, and their objects."""

    pixel_values: Any
    """(batch, height, width, 3) float32, zero where there is padding."""
    pixel_mask: Any
    """(batch, height, width) bool, true where the image is."""
    targets: Targets


def load_views(
    layout: ViewsLayout, dataset: Dataset, preprocessing: Preprocessing, objects: int, rows: slice
) -> TrainingBatch:
    """Some rows of a batch, read from a data set, with their objects padded to a number."""
    views = layout.views[rows]
    examples = [dataset[index] for index in layout.indices[rows]]
    images = [view.preprocess(one.image, preprocessing) for view, one in zip(views, examples, strict=True)]
    in_views = (view.objects(example) for view, example in zip(views, examples, strict=True))
    return TrainingBatch(*pad(images, layout.shape), padded_targets(in_views, (len(views), objects)))


class AugmentedBatches:
    """Batches of random views of a data set's images, other ones in every pass; a `BatchSource`.

    Args:
        model: the detector that is trained, on the devices that share every batch, see `detr_jax.mesh`.
        dataset: with the classes of the detector, see `detr_jax.data.classes.with_classes`.
        batch_size: images per batch, over all devices.
        seed: of order and views.
        views: how they are drawn.

    Raises:
        InputError: if there are fewer images than a batch has, one of them is too elongated or has more objects than
            the detector has queries, or the devices cannot share a batch.
    """

    def __init__(self, model: Detector, dataset: Dataset, batch_size: int, seed: int, views: Views = "official"):
        if not model.preprocessing.has_sides:
            raise InputError(
                f"views for training need a shorter side and a cap on the longer one, and this detector's images are "
                f"resized by {model.preprocessing.resize!r}: pass --size SHORTER LONGER"
            )
        if len(dataset) < batch_size:
            raise InputError(f"{dataset.name} has {len(dataset)} images, too few for a batch of {batch_size}")
        self._dataset, self._preprocessing = dataset, model.preprocessing
        self._batch_size, self._seed, self._views, self._mesh = batch_size, seed, views, mesh_of(model)
        self._rows = local_slice(self._mesh, batch_size)
        layout_batches(dataset.image_sizes(), model.preprocessing, 1, image_name=dataset.image_name)  # none is a line
        annotations, classes = dataset.ground_truth()["annotations"], len(model.labels)
        counts = Counter(a["image_id"] for a in annotations if not a["iscrowd"] and a["category_id"] < classes)
        self._objects = max(counts.values(), default=1)
        for index, image_id in enumerate(dataset.image_ids()):
            if counts[image_id] > model.queries:
                raise InputError(
                    f"{dataset.image_name(index)} has {counts[image_id]} objects, but the detector has only "
                    f"{model.queries} object queries: leave such images out, or cut them into parts"
                )

    def __len__(self) -> int:
        return len(self._dataset) // self._batch_size

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[TrainingBatch]:
        """Batches of a pass from position `start` on, on the devices that share them."""
        sizes, rows = self._dataset.image_sizes(), self._rows
        layouts = layout_views(sizes, self._preprocessing, self._batch_size, self._seed, epoch, self._views)[start:]
        fixed: dict[str, Any] = {"preprocessing": self._preprocessing, "objects": self._objects, "rows": rows}
        own = rows.stop - rows.start
        pixels = max((math.prod(layout.shape) for layout in layouts), default=0)
        processes = processes_for(own * len(layouts), own * pixels * 3 * np.dtype(np.float32).itemsize or 1)
        loaded = prefetch(layouts, partial(load_views, dataset=self._dataset, **fixed), processes)
        return (shard_batch(self._mesh, batch) for batch in loaded)
