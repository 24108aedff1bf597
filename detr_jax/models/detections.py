"""Detections, of a batch as arrays and of one image as its best."""

from dataclasses import dataclass

import jax
import numpy as np

from detr_jax.pytrees import pytree


@pytree
class Detections:
    """Scored boxes of a batch, one for each object query or as many as a detector returns."""

    scores: jax.Array
    """(batch, queries) float32, probability of the class."""
    labels: jax.Array
    """(batch, queries) int32, classes."""
    boxes: jax.Array
    """(batch, queries, 4) float32, (x0, y0, x1, y1) in pixels of the original image."""


@dataclass(frozen=True)
class ImageDetections:
    """What was found in one image, the best first."""

    boxes: np.ndarray
    """(objects, 4) float32, (x0, y0, x1, y1) in pixels."""
    labels: np.ndarray
    """(objects,) int32 classes."""
    names: tuple[str, ...]
    """Of the classes, empty for one without a name."""
    scores: np.ndarray
    """(objects,) float32 from 0 to 1."""

    def __len__(self) -> int:
        return len(self.scores)


def in_image(detections: Detections, index: int, threshold: float, labels: tuple[str, ...]) -> ImageDetections:
    """The detections in one image of a batch whose scores reach a threshold; `labels` are the names of all classes."""
    scores = np.asarray(detections.scores[index])
    order = np.argsort(-scores, kind="stable")
    kept = order[scores[order] >= threshold]
    found = np.asarray(detections.labels[index])[kept]
    return ImageDetections(
        np.asarray(detections.boxes[index])[kept], found, tuple(labels[i] for i in found), scores[kept]
    )
