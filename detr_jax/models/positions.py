"""Sine position encoding of an image's feature map, normalised by the part of it that is not padding."""

import jax
import jax.numpy as jnp

TEMPERATURE = 10000.0
EPSILON = 1e-6


def sine_features(position: jax.Array, features: int) -> jax.Array:
    """(...) from 0 to 1 -> (..., features), sines and cosines of falling frequencies in turns."""
    frequencies = TEMPERATURE ** (2 * (jnp.arange(features) // 2) / features)
    angles = (position * 2 * jnp.pi)[..., None] / frequencies
    pairs = jnp.stack([jnp.sin(angles[..., 0::2]), jnp.cos(angles[..., 1::2])], axis=-1)
    return pairs.reshape(*angles.shape)


def sine_positions(mask: jax.Array, features: int, offset: float = 0.0) -> jax.Array:
    """(batch, height, width) bool, true where the image is -> (batch, height, width, features) float32.

    Carion et al. 2020, supplementary A.4: rows in the first half of the features, whose number must be a multiple of 4,
    columns in the second. Positions run from 0 to 2 pi over the unpadded image. DETR counts cells from 1; Deformable
    DETR has an `offset` of -0.5 to their centres.
    """
    if features % 4:
        raise ValueError(f"positions need a multiple of 4 features, got {features}")
    present = mask.astype(jnp.float32)

    def encode(axis: int) -> jax.Array:
        steps = jnp.cumsum(present, axis=axis)
        last = jax.lax.slice_in_dim(steps, steps.shape[axis] - 1, None, axis=axis)
        return sine_features((steps + offset) / (last + EPSILON), features // 2)

    return jnp.concatenate([encode(1), encode(2)], axis=-1)


def downsample_mask(mask: jax.Array, height: int, width: int) -> jax.Array:
    """Nearest-neighbour resize of a (batch, height, width) mask, sampling where torch's `interpolate` does."""
    rows = jnp.arange(height) * mask.shape[1] // height
    columns = jnp.arange(width) * mask.shape[2] // width
    return mask[:, rows][:, :, columns]
