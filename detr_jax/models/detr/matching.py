"""One-to-one matching of object queries to objects (Carion et al. 2020, section 3.1)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from detr_jax.models.boxes import generalised_iou
from detr_jax.pytrees import pytree

CLASS_COST = 1.0
BOX_COST = 5.0
GIOU_COST = 2.0


@pytree
class Targets:
    """Objects of a batch of images, padded to the same number."""

    labels: Any
    """(batch, objects) int32 class indices."""
    boxes: Any
    """(batch, objects, 4) float32, (cx, cy, w, h) as fractions of the image."""
    valid: Any
    """(batch, objects) bool, false for padding."""


def match(probabilities: jax.Array, boxes: jax.Array, targets: Targets) -> jax.Array:
    """The query of each object, by minimal total cost: class probability, L1 and generalised IoU of the boxes.

    Args:
        probabilities: (queries, classes).
        boxes: (queries, 4), (cx, cy, w, h).
        targets: of one image, without an axis of images.

    Returns:
        (objects,) int, indices of queries, all different; those of padding are arbitrary.

    Raises:
        ValueError: if there are more objects than queries.
    """
    queries, objects = probabilities.shape[0], targets.labels.shape[0]
    if objects > queries:
        raise ValueError(f"{queries} queries cannot be matched to {objects} objects")
    distance = jnp.abs(boxes[:, None] - targets.boxes[None]).sum(-1)
    overlap = generalised_iou(boxes[:, None], targets.boxes[None])
    cost = BOX_COST * distance - CLASS_COST * probabilities[:, targets.labels] - GIOU_COST * overlap
    # Padding costs the same everywhere, so it takes whichever queries the objects leave.
    cost = jax.lax.stop_gradient(jnp.where(targets.valid, cost, 0.0))
    rows, columns = optax.assignment.hungarian_algorithm(cost)
    return jnp.zeros(objects, rows.dtype).at[columns].set(rows)
