"""The losses that train a detector: DETR's own, and two that help a small one along.

`detection_loss` is Carion et al. 2020 (section 3 and appendix A.2), and where every class has a sigmoid Zhu et al. 2021
(Deformable DETR, appendix A.4). `dense_loss` and `hoyer_penalty` are ours, used only to make the embedded detectors:
neither belongs to the sparsity method.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from detr_jax.models import DetrOutputs, FFNTrace
from detr_jax.models.boxes import corners, generalised_iou
from detr_jax.models.detr.matching import FOCAL_ALPHA, FOCAL_GAMMA, Targets, focal_cost, match, probability_cost

NO_OBJECT_WEIGHT = 0.1
FOCAL_WEIGHT = 2.0
BOX_WEIGHT = 5.0
GIOU_WEIGHT = 2.0


class BatchCounts(NamedTuple):
    """Object queries and objects of all images of a batch, over which its losses are averaged."""

    queries: int
    objects: jax.Array


def _class_loss(logits: jax.Array, labels: jax.Array, total: jax.Array | None = None) -> jax.Array:
    """Cross-entropy in which "no object" counts a tenth, averaged by weight: that of all logits, or `total`."""
    no_object = logits.shape[-1] - 1
    weights = jnp.where(labels == no_object, NO_OBJECT_WEIGHT, 1.0)
    log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    return -(weights * log_likelihood).sum() / (weights.sum() if total is None else total)


def _focal_loss(logits: jax.Array, labels: jax.Array, total: jax.Array) -> jax.Array:
    """Focal loss (Lin et al. 2017) of all classes' sigmoids over `total`; beyond the classes lies "no object"."""
    present = jax.nn.one_hot(labels, logits.shape[-1])
    right = jax.nn.sigmoid(jnp.where(present > 0, logits, -logits))
    weights = jnp.where(present > 0, FOCAL_ALPHA, 1 - FOCAL_ALPHA) * (1 - right) ** FOCAL_GAMMA
    likelihood = jax.nn.log_sigmoid(jnp.where(present > 0, logits, -logits))
    return -FOCAL_WEIGHT * (weights * likelihood).sum() / jnp.maximum(total, 1)


def _box_loss(boxes: jax.Array, targets: jax.Array, valid: jax.Array, total: jax.Array | None = None) -> jax.Array:
    """L1 and generalised IoU loss, averaged over the valid boxes, or so many in `total`."""
    distance = jnp.abs(boxes - targets).sum(-1)
    overlap = generalised_iou(boxes, targets)
    loss = BOX_WEIGHT * distance + GIOU_WEIGHT * (1 - overlap)
    return jnp.where(valid, loss, 0).sum() / jnp.maximum(valid.sum() if total is None else total, 1)


def detection_loss(
    outputs: DetrOutputs, targets: Targets, whole: BatchCounts | None = None, *, sigmoid: bool = False
) -> jax.Array:
    """DETR's set loss, summed over the final and the auxiliary outputs, each with its own matching.

    Of images that are a part of a batch, `whole`, the share of its loss: those of all parts add up to it. With
    `sigmoid`, every class has one, and the loss is Deformable DETR's.
    """
    every = (*outputs.auxiliary, (outputs.logits, outputs.boxes))
    return sum((_set_loss(logits, boxes, targets, whole, sigmoid) for logits, boxes in every), jnp.float32(0))


def _set_loss(
    logits: jax.Array, boxes: jax.Array, targets: Targets, whole: BatchCounts | None, sigmoid: bool
) -> jax.Array:
    probabilities = jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits)
    cost = focal_cost if sigmoid else probability_cost
    queries = jax.vmap(partial(match, class_cost=cost))(probabilities, boxes, targets)
    image = jnp.arange(len(logits))[:, None]
    no_object = logits.shape[-1] - 1 + sigmoid
    labels = jnp.full(logits.shape[:2], no_object)
    labels = labels.at[image, queries].set(jnp.where(targets.valid, targets.labels, no_object))
    objects = None if whole is None else whole.objects
    box_loss = _box_loss(boxes[image, queries], targets.boxes, targets.valid, objects)
    if sigmoid:
        return _focal_loss(logits, labels, targets.valid.sum() if objects is None else objects) + box_loss
    # Every object has a query, so that the weights of a batch are known before the matching.
    weight = None if whole is None else NO_OBJECT_WEIGHT * whole.queries + (1 - NO_OBJECT_WEIGHT) * whole.objects
    return _class_loss(logits, labels, weight) + box_loss


def dense_loss(
    logits: jax.Array, boxes: jax.Array, centres: jax.Array, targets: Targets, *, sigmoid: bool = False
) -> jax.Array:
    """Asks every encoder token for the class and box of the smallest object over its centre.

    `logits` (batch, tokens, logits) and `boxes` (batch, tokens, 4) are what a `DenseHead` says about images without
    padding, `centres` (tokens, 2) are the tokens' `token_centres`; `sigmoid` as of `detection_loss`.
    """
    centre = centres[None, :, None]
    box = corners(targets.boxes)[:, None]
    inside = ((centre > box[..., :2]) & (centre < box[..., 2:])).all(-1) & targets.valid[:, None]
    area = jnp.prod(targets.boxes[..., 2:], axis=-1)[:, None]
    smallest = jnp.where(inside, area, jnp.inf).argmin(-1)
    covered = inside.any(-1)
    image = jnp.arange(len(logits))[:, None]
    labels = jnp.where(covered, targets.labels[image, smallest], logits.shape[-1] - 1 + sigmoid)
    class_loss = _focal_loss(logits, labels, covered.sum()) if sigmoid else _class_loss(logits, labels)
    return class_loss + _box_loss(boxes, targets.boxes[image, smallest], covered)


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
