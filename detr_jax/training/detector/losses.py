"""The losses that train a detector: DETR's own, and two that help a small one along.

`detection_loss` is Carion et al. 2020 (section 3 and appendix A.2). `dense_loss` and `hoyer_penalty` are ours, used
only to make the embedded detector: neither belongs to the sparsity method.
"""

import jax
import jax.numpy as jnp

from detr_jax.models import DetrOutputs, FFNTrace
from detr_jax.models.boxes import corners, generalised_iou
from detr_jax.models.detr.matching import Targets, match
from detr_jax.training.detector.dense_head import token_centres

NO_OBJECT_WEIGHT = 0.1
BOX_WEIGHT = 5.0
GIOU_WEIGHT = 2.0


def _class_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy in which "no object" counts a tenth, averaged by weight."""
    no_object = logits.shape[-1] - 1
    weights = jnp.where(labels == no_object, NO_OBJECT_WEIGHT, 1.0)
    log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    return -(weights * log_likelihood).sum() / weights.sum()


def _box_loss(boxes: jax.Array, targets: jax.Array, valid: jax.Array) -> jax.Array:
    """L1 and generalised IoU loss, averaged over the valid boxes."""
    distance = jnp.abs(boxes - targets).sum(-1)
    overlap = generalised_iou(boxes, targets)
    loss = BOX_WEIGHT * distance + GIOU_WEIGHT * (1 - overlap)
    return jnp.where(valid, loss, 0).sum() / jnp.maximum(valid.sum(), 1)


def detection_loss(outputs: DetrOutputs, targets: Targets) -> jax.Array:
    """DETR's set loss, summed over the final and the auxiliary outputs, each with its own matching."""
    every = (*outputs.auxiliary, (outputs.logits, outputs.boxes))
    return sum((_set_loss(logits, boxes, targets) for logits, boxes in every), jnp.float32(0))


def _set_loss(logits: jax.Array, boxes: jax.Array, targets: Targets) -> jax.Array:
    queries = jax.vmap(match)(jax.nn.softmax(logits), boxes, targets)
    image = jnp.arange(len(logits))[:, None]
    no_object = logits.shape[-1] - 1
    labels = jnp.full(logits.shape[:2], no_object)
    labels = labels.at[image, queries].set(jnp.where(targets.valid, targets.labels, no_object))
    return _class_loss(logits, labels) + _box_loss(boxes[image, queries], targets.boxes, targets.valid)


def dense_loss(logits: jax.Array, boxes: jax.Array, targets: Targets) -> jax.Array:
    """Asks every encoder token for the class and box of the smallest object over its centre.

    `logits` (batch, rows, columns, classes + 1) and `boxes` (batch, rows, columns, 4) are what a `DenseHead` says about
    images without padding.
    """
    _, rows, columns, classes = logits.shape
    centre = token_centres(rows, columns)[None, :, :, None]
    box = corners(targets.boxes)[:, None, None]
    inside = ((centre > box[..., :2]) & (centre < box[..., 2:])).all(-1) & targets.valid[:, None, None]
    area = jnp.prod(targets.boxes[..., 2:], axis=-1)[:, None, None]
    smallest = jnp.where(inside, area, jnp.inf).argmin(-1)
    covered = inside.any(-1)
    image = jnp.arange(len(logits))[:, None, None]
    labels = jnp.where(covered, targets.labels[image, smallest], classes - 1)
    return _class_loss(logits, labels) + _box_loss(boxes, targets.boxes[image, smallest], covered)


def hoyer_penalty(traces: dict[str, FFNTrace]) -> jax.Array:
    """Hoyer-square (sum h)^2 / (F sum h^2) of the hidden activations: 1 if all are equal, 1 / F if one fires.

    Averaged over tokens, then over FFNs. Yang et al. 2020, "DeepHoyer"; here on activations.
    """
    return jnp.stack([_hoyer_square(trace) for trace in traces.values()]).mean()


def _hoyer_square(trace: FFNTrace) -> jax.Array:
    # As matrix products: reductions fused into the FFN's backward pass take several times as long on CPUs.
    hidden = trace.hidden
    total = jnp.einsum("btf,f->bt", hidden, jnp.ones(hidden.shape[-1]))
    squares = jnp.einsum("btf,btf->bt", hidden, hidden)
    ratio = total**2 / (hidden.shape[-1] * squares + 1e-6)
    return jnp.where(trace.tokens, ratio, 0).sum() / trace.tokens.sum()
