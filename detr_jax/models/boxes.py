"""Boxes as (cx, cy, w, h) in fractions of the image."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


def corners(boxes: jax.Array) -> jax.Array:
    """(..., 4) (cx, cy, w, h) -> (x0, y0, x1, y1)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([centre - size / 2, centre + size / 2], axis=-1)


def corners_in_pixels(
    boxes: Float[Array, "batch queries 4"], sizes: Shaped[Array, "batch 2"]
) -> Float[Array, "batch queries 4"]:
    """(cx, cy, w, h) in fractions of images -> (x0, y0, x1, y1) in their pixels; `sizes` are heights and widths."""
    return corners(boxes) * jnp.tile(sizes[:, None, ::-1], 2).astype(boxes.dtype)


def generalised_iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """(..., 4) boxes, broadcast against each other -> (...) in [-1, 1].

    Rezatofighi et al. 2019: IoU less the share of the enclosing box that the union leaves empty.
    """
    area_a, area_b = a[..., 2] * a[..., 3], b[..., 2] * b[..., 3]
    a, b = corners(a), corners(b)
    inner = jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2])
    intersection = jnp.prod(jnp.maximum(inner, 0), axis=-1)
    enclosing = jnp.prod(jnp.maximum(a[..., 2:], b[..., 2:]) - jnp.minimum(a[..., :2], b[..., :2]), axis=-1)
    union = area_a + area_b - intersection
    tiny = jnp.finfo(a.dtype).tiny
    return intersection / jnp.maximum(union, tiny) - (enclosing - union) / jnp.maximum(enclosing, tiny)
