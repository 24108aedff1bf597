"""One-to-one matching of object queries to objects (Carion et al. 2020, section 3.1)."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from detr_jax.models.boxes import generalised_iou
from detr_jax.pytrees import pytree

CLASS_COST = 1.0
BOX_COST = 5.0
GIOU_COST = 2.0
FOCAL_COST = 2.0
FOCAL_ALPHA, FOCAL_GAMMA, FOCAL_EPSILON = 0.25, 2.0, 1e-8
"""Of Deformable DETR's class cost (Zhu et al. 2021); the first two are its focal loss's too (Lin et al. 2017)."""


@pytree
class Targets:
    """Objects of a batch of images, padded to the same number."""

    labels: Any
    """(batch, objects) int32 class indices."""
    boxes: Any
    """(batch, objects, 4) float32, (cx, cy, w, h) as fractions of the image."""
    valid: Any
    """(batch, objects) bool, false for padding."""


def padded_targets(objects: Iterable[tuple[np.ndarray, np.ndarray]], shape: tuple[int, int]) -> Targets:
    """Targets of a shape (images, objects) from the labels (n,) and boxes (n, 4) of the first images, in numpy."""
    targets = Targets(np.zeros(shape, np.int32), np.full((*shape, 4), 0.5, np.float32), np.zeros(shape, bool))
    for image, (labels, boxes) in enumerate(objects):
        targets.labels[image, : len(labels)] = labels
        targets.boxes[image, : len(labels)] = boxes
        targets.valid[image, : len(labels)] = True
    return targets


def probability_cost(probabilities: jax.Array) -> jax.Array:
    """Cost of each class by DETR's matching."""
    return -CLASS_COST * probabilities


def focal_cost(probabilities: jax.Array) -> jax.Array:
    """Cost of each class's sigmoid by Deformable DETR's matching: the focal losses of its presence less its absence."""
    present = FOCAL_ALPHA * (1 - probabilities) ** FOCAL_GAMMA * -jnp.log(probabilities + FOCAL_EPSILON)
    absent = (1 - FOCAL_ALPHA) * probabilities**FOCAL_GAMMA * -jnp.log(1 - probabilities + FOCAL_EPSILON)
    return FOCAL_COST * (present - absent)


def match(
    probabilities: jax.Array,
    boxes: jax.Array,
    targets: Targets,
    class_cost: Callable[[jax.Array], jax.Array] = probability_cost,
) -> jax.Array:
    """The query of each object, by minimal total cost: class probability, L1 and generalised IoU of the boxes.

    Args:
        probabilities: (queries, classes).
        boxes: (queries, 4), (cx, cy, w, h).
        targets: of one image, without an axis of images.
        class_cost: of the probabilities.

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
    cost = BOX_COST * distance + class_cost(probabilities)[:, targets.labels] - GIOU_COST * overlap
    # Padding costs the same everywhere, so it takes whichever queries the objects leave.
    cost = jax.lax.stop_gradient(jnp.where(targets.valid, cost, 0.0))
    rows, columns = optax.assignment.hungarian_algorithm(cost)
    return jnp.zeros(objects, rows.dtype).at[columns].set(rows)
