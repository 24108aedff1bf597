"""How much a detector's outputs change: what stands in for AP where many settings are tried."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from detr_jax.models.detr.modeling import DetrOutputs

BOX_WEIGHT = 5.0
"""Of the L1 distance of boxes, as in DETR's loss (Carion et al. 2020)."""


def output_divergence(before: DetrOutputs, after: DetrOutputs) -> jax.Array:
    """(batch,) the change of the outputs for each image, averaged over object queries.

    The Kullback-Leibler divergence of the classes, and `BOX_WEIGHT` times the L1 distance of the boxes as fractions of
    the image, weighted by the probability that there was an object: boxes of "no object" do not matter.

    Args:
        before: outputs of the dense detector.
        after: of the sparse one, for the same images.
    """
    dense, sparse = jax.nn.log_softmax(before.logits), jax.nn.log_softmax(after.logits)
    divergence = (jnp.exp(dense) * (dense - sparse)).sum(-1)
    object_probability = 1 - jnp.exp(dense[..., -1])
    distance = jnp.abs(before.boxes - after.boxes).sum(-1)
    return (divergence + BOX_WEIGHT * object_probability * distance).mean(-1)
