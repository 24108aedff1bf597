"""DETR's outputs: detections as the official `PostProcess` makes them, and how much sparsity changes them.

For logits with "no object" last, and, as of Conditional and Deformable DETR, for a sigmoid for each class.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from detr_jax.models.boxes import corners_in_pixels
from detr_jax.models.detections import Detections
from detr_jax.models.ffn import FFNTrace
from detr_jax.pytrees import pytree

DETECTIONS = 100
"""Of an image, over all queries and classes, where every class has a sigmoid; as in the official post-processing."""
BOX_WEIGHT = 5.0
"""Of the L1 distance of boxes, as in DETR's loss (Carion et al. 2020)."""


@pytree
class DetrOutputs:
    """Outputs of a DETR for a batch of images, in float32."""

    logits: jax.Array
    """(batch, queries, classes + 1), "no object" last, or (batch, queries, classes) for sigmoids."""
    boxes: jax.Array
    """(batch, queries, 4) as (cx, cy, w, h), fractions of the unpadded image."""
    auxiliary: tuple[tuple[jax.Array, jax.Array], ...] = ()
    """(logits, boxes) after each decoder layer but the last, if asked for."""
    encoder: tuple[jax.Array, ...] = ()
    """(batch, tokens, d) input and output of the encoder, if auxiliary outputs were asked for."""
    traces: dict[str, FFNTrace] | None = None
    """Of the FFNs by name, if asked for."""


def class_probabilities(logits: Float[Array, "*queries logits"]) -> Float[Array, "*queries classes"]:
    """Probabilities of the classes; the last logit is that of "no object"."""
    return jax.nn.softmax(logits)[..., :-1]


def postprocess(
    logits: Float[Array, "batch queries logits"],
    boxes: Float[Array, "batch queries 4"],
    sizes: Shaped[Array, "batch 2"],
) -> Detections:
    """Detections in pixels of the original images, whose heights and widths are `sizes`."""
    probabilities = class_probabilities(logits)
    labels = probabilities.argmax(-1).astype(jnp.int32)
    return Detections(probabilities.max(-1), labels, corners_in_pixels(boxes, sizes))


def output_divergence(before: DetrOutputs, after: DetrOutputs) -> Float[Array, " batch"]:
    """Change of the dense outputs `before` to the sparse ones `after` for each image, mean over object queries.

    The Kullback-Leibler divergence of the classes, and `BOX_WEIGHT` times the L1 distance of the boxes as fractions of
    the image, weighted by the probability that there was an object: boxes of "no object" do not matter.
    """
    dense, sparse = jax.nn.log_softmax(before.logits), jax.nn.log_softmax(after.logits)
    divergence = (jnp.exp(dense) * (dense - sparse)).sum(-1)
    object_probability = 1 - jnp.exp(dense[..., -1])
    distance = jnp.abs(before.boxes - after.boxes).sum(-1)
    return (divergence + BOX_WEIGHT * object_probability * distance).mean(-1)


def sigmoid_detections(
    logits: Float[Array, "batch queries classes"],
    boxes: Float[Array, "batch queries 4"],
    sizes: Shaped[Array, "batch 2"],
) -> Detections:
    """As `postprocess`: the best of all pairs of a query and a class."""
    batch, queries, classes = logits.shape
    probabilities = jax.nn.sigmoid(logits).reshape(batch, queries * classes)
    scores, best = jax.lax.top_k(probabilities, min(DETECTIONS, queries * classes))
    boxes = jnp.take_along_axis(boxes, (best // classes)[..., None], axis=1)
    return Detections(scores, (best % classes).astype(jnp.int32), corners_in_pixels(boxes, sizes))


def sigmoid_divergence(before: DetrOutputs, after: DetrOutputs) -> Float[Array, " batch"]:
    """As `output_divergence`, with the divergences of all classes' sigmoids; a box counts by its most likely class."""
    probabilities = jax.nn.sigmoid(before.logits)
    present = jax.nn.log_sigmoid(before.logits) - jax.nn.log_sigmoid(after.logits)
    absent = jax.nn.log_sigmoid(-before.logits) - jax.nn.log_sigmoid(-after.logits)
    divergence = (probabilities * present + (1 - probabilities) * absent).sum(-1)
    distance = jnp.abs(before.boxes - after.boxes).sum(-1)
    return (divergence + BOX_WEIGHT * probabilities.max(-1) * distance).mean(-1)


class SigmoidClasses:
    """Use of `DetrOutputs` by a detector whose classes each have a sigmoid; a base class before `Detector`."""

    def query_predictions(
        self, outputs: DetrOutputs
    ) -> tuple[Float[Array, "batch queries classes"], Float[Array, "batch queries 4"]]:
        return jax.nn.sigmoid(outputs.logits), outputs.boxes

    def detections(self, outputs: DetrOutputs, sizes: Shaped[Array, "batch 2"]) -> Detections:
        return sigmoid_detections(outputs.logits, outputs.boxes, sizes)

    def divergence(self, dense: DetrOutputs, sparse: DetrOutputs) -> Float[Array, " batch"]:
        return sigmoid_divergence(dense, sparse)
