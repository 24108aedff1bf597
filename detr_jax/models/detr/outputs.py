"""DETR's outputs: detections as the official `PostProcess` makes them, and how much sparsity changes them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from detr_jax.models.boxes import corners
from detr_jax.models.detections import Detections
from detr_jax.models.ffn import FFNTrace
from detr_jax.pytrees import pytree

BOX_WEIGHT = 5.0
"""Of the L1 distance of boxes, as in DETR's loss (Carion et al. 2020)."""


@pytree
class DetrOutputs:
    """Outputs of a DETR for a batch of images, in float32."""

    logits: jax.Array
    """(batch, queries, classes + 1), "no object" last."""
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
    scale = jnp.tile(sizes[:, None, ::-1], 2).astype(boxes.dtype)
    return Detections(probabilities.max(-1), probabilities.argmax(-1).astype(jnp.int32), corners(boxes) * scale)


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
