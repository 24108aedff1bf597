"""From DETR's outputs to detections, as the official `PostProcess` does it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from detr_jax.models.boxes import corners
from detr_jax.models.detections import Detections


def class_probabilities(logits: Float[Array, "*queries logits"]) -> Float[Array, "*queries classes"]:
    """Probabilities of the classes; the last logit is that of "no object"."""
    return jax.nn.softmax(logits)[..., :-1]


def postprocess(
    logits: Float[Array, "batch queries logits"],
    boxes: Float[Array, "batch queries 4"],
    sizes: Shaped[Array, "batch 2"],
) -> Detections:
    """Detections in pixels.

    Args:
        logits: of the classes, "no object" last.
        boxes: (cx, cy, w, h) in fractions of the image.
        sizes: height and width of the original images in pixels.
    """
    probabilities = class_probabilities(logits)
    scale = jnp.tile(sizes[:, None, ::-1], 2).astype(boxes.dtype)
    return Detections(probabilities.max(-1), probabilities.argmax(-1).astype(jnp.int32), corners(boxes) * scale)
