"""From a detector's outputs to detections, as the official `PostProcess` does it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from detr_jax.model.boxes import corners


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
