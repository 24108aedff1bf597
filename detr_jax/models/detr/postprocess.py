"""From a detector's outputs to detections, as the official `PostProcess` does it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.models.boxes import corners


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Detections:
    """What each object query found.

    Attributes:
        scores: (batch, queries) float32, probability of the class.
        labels: (batch, queries) int32, the best class that is not "no object".
        boxes: (batch, queries, 4) float32, (x0, y0, x1, y1) in pixels of the original image.
    """

    scores: jax.Array
    labels: jax.Array
    boxes: jax.Array


def postprocess(logits: jax.Array, boxes: jax.Array, sizes: jax.Array) -> Detections:
    """Detections in pixels.

    Args:
        logits: (batch, queries, classes + 1), "no object" last.
        boxes: (batch, queries, 4) as (cx, cy, w, h), fractions of the image.
        sizes: (batch, 2), height and width of the original images in pixels.
    """
    probabilities = jax.nn.softmax(logits)[..., :-1]
    scale = jnp.tile(sizes[:, None, ::-1], 2).astype(boxes.dtype)
    return Detections(probabilities.max(-1), probabilities.argmax(-1).astype(jnp.int32), corners(boxes) * scale)


@dataclass(frozen=True)
class ImageDetections:
    """What was found in one image, the best first.

    Attributes:
        boxes: (objects, 4) float32, (x0, y0, x1, y1) in pixels.
        labels: (objects,) int32 classes.
        names: of the classes, empty for one without a name.
        scores: (objects,) float32 from 0 to 1.
    """

    boxes: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    scores: np.ndarray

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
