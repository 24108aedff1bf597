"""Detection in files, PIL images and arrays. Loading is imported late, so that `import detr_jax` is quick."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from detr_jax.data.dataset import Dataset
from detr_jax.data.image_list import GivenImages, ImageLike, as_list, is_many
from detr_jax.errors import InputError
from detr_jax.models import Detector, Selectors
from detr_jax.models.detections import ImageDetections, in_image

if TYPE_CHECKING:
    from detr_jax.sparse import SparseDETR


def detect(
    model: Detector | SparseDETR,
    images: ImageLike | Sequence[ImageLike],
    threshold: float = 0.7,
    *,
    batch_size: int = 1,
    selectors: Selectors | None = None,
) -> ImageDetections | list[ImageDetections]:
    """Objects in images of any sizes, which are padded to a few shapes so that few programs are compiled.

    Args:
        images: one or many files, PIL images, or (height, width, 3) uint8 RGB arrays. A list, a tuple or an array with
            four axes are many. Files and PIL images are made upright where their EXIF data ask for it.
        threshold: least score, from 0 to 1.
        batch_size: number of images computed together.
        selectors: selector of each sparse FFN by name, for a dense detector.

    Returns:
        Objects in the image, or a list of that for many. Boxes are in pixels of the upright image and clipped to it.

    Raises:
        MissingFileError: if a file does not exist.
        InputTypeError: if something is no image at all.
        InputError: if a file or array is not an image, the threshold is no score, the batch size is not positive, or
            the detector's scores are not finite.

    >>> import detr_jax
    >>> from detr_jax.data.scenes import ScenesDataset
    >>> scenes = ScenesDataset("val", 2)
    >>> one, other = detr_jax.detect(detr_jax.load("detr-tiny"), [scenes[0].image, scenes[1].image])
    >>> one.names
    ('ring', 'star', 'cross')
    >>> one.boxes.shape, one.labels.tolist(), bool(one.scores.min() >= 0.7)
    ((3, 4), [6, 4, 5], True)
    """
    dataset = GivenImages(as_list(images))
    found = dict(detect_each(model, dataset, threshold, batch_size=batch_size, selectors=selectors))
    return [found[i] for i in range(len(dataset))] if is_many(images) else found[0]


def detect_each(
    model: Detector | SparseDETR,
    dataset: Dataset,
    threshold: float,
    *,
    batch_size: int = 1,
    selectors: Selectors | None = None,
) -> Iterator[tuple[int, ImageDetections]]:
    """Objects in each image of a data set, with its id, image by image as they are loaded; see `detect`.

    Boxes are clipped to the image here and not before AP is measured, as in the official post-processing.
    """
    from detr_jax.evaluation.counts import kept_share
    from detr_jax.evaluation.evaluate import warn_if_far_from_calibration
    from detr_jax.evaluation.runs import predictions
    from detr_jax.sparse import SparseDETR

    check_threshold(threshold)
    if not len(dataset):
        return
    plan = None
    if isinstance(
        model, SparseDETR
    ):  # its facts stay outside: what it was measured to do is no reason to compile again
        plan, model = model.plan, model.detector
        selectors = plan.selectors
    densities: list[float] = []
    measure = None if plan is None else kept_share
    found_in = predictions(model, dataset, batch_size, selectors=selectors, progress=False, measure=measure)
    for batch, _, detections, density in found_in:
        for i in batch.valid.nonzero()[0].tolist():
            found = in_image(detections, i, threshold, model.labels)
            yield int(batch.image_ids[i]), replace(found, boxes=found.boxes.clip(0, np.tile(batch.sizes[i, ::-1], 2)))
        densities += [] if density is None else density[batch.valid].tolist()
    if plan is not None:
        # Among images like those of the calibration, single ones differ by up to 1.7 from the mean.
        far = {} if len(densities) >= 8 else {"tolerance": 2.0}
        warn_if_far_from_calibration(plan.measured, float(np.mean(densities)), dataset.name, **far)


def check_threshold(threshold: float) -> None:
    """Raises an InputError if a threshold is no score."""
    if not 0 <= threshold <= 1:
        raise InputError(f"the threshold is a score from 0 to 1, not {threshold}")
