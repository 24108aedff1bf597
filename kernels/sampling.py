"""Multi-scale sampling, the attention of Deformable DETR (Zhu et al. 2021, equation 3).

Notation: S cells of all levels one after the other, rows first; Q queries, H heads of D features, L levels, P points::

    out[q, h] = sum over l, p of weights[q, h, l, p] * value_l[locations[q, h, l, p], h]

with `value_l` read bilinearly between the centres of its cells, and zero outside.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from detr_jax.kernels import sampling_tpu
from detr_jax.kernels.backend import SamplingShape
from detr_jax.kernels.transforms import on_each_shard, varying_alike

Shapes = tuple[tuple[int, int], ...]
"""Rows and columns of each level."""


def multi_scale_sampling(
    value: Float[Array, "batch S H D"],
    shapes: Shapes,
    locations: Float[Array, "batch Q H L P 2"],
    weights: Float[Array, "batch Q H L P"],
) -> Float[Array, "batch Q H*D"]:
    """Sums of values at sampled locations, summed in float32, in the dtype of the values.

    On TPUs, where the queries are the cells themselves and sample near themselves, in Pallas; elsewhere by gathers.

    Args:
        value: of all levels.
        shapes: of the levels.
        locations: (x, y) as fractions of each level; may lie outside.
        weights: of the points.
    """
    locations, weights = locations.astype(jnp.float32), weights.astype(jnp.float32)
    shape = SamplingShape(value.dtype, locations.shape[1], shapes, *value.shape[2:])
    if sampling_tpu.unsupported_reason(shape) is not None:
        return _gathered(shapes, value, locations, weights)

    def run(value: jax.Array, _: None, locations: jax.Array, weights: jax.Array) -> jax.Array:
        return _near_or_gathered(shapes, *varying_alike(value, locations, weights))

    return on_each_shard(run, value, None, locations, weights)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _near_or_gathered(shapes: Shapes, value: jax.Array, locations: jax.Array, weights: jax.Array) -> jax.Array:
    """`sampling_tpu.run` where every sample lies in its window, gathers otherwise, and the derivatives of these."""
    near = sampling_tpu.fits(shapes, locations)
    return jax.lax.cond(near, partial(_near, shapes), partial(_gathered, shapes), value, locations, weights)


@_near_or_gathered.defjvp
def _tangents(shapes: Shapes, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[Any, Any]:
    return _near_or_gathered(shapes, *primals), jax.jvp(partial(_gathered, shapes), primals, tangents)[1]


def _near(shapes: Shapes, value: jax.Array, locations: jax.Array, weights: jax.Array) -> jax.Array:
    return sampling_tpu.run(value, shapes, locations, weights)


def _gathered(shapes: Shapes, value: jax.Array, locations: jax.Array, weights: jax.Array) -> jax.Array:
    """Every tap, a corner of a cell of a point, is a gather of its own that XLA fuses into the sum: the array of all
    taps, 64 times as large as the result, is never made."""

    def of_image(value: jax.Array, locations: jax.Array, weights: jax.Array) -> jax.Array:
        cells, heads, features = value.shape
        rows = value.reshape(cells * heads, features)
        total = jnp.zeros((*locations.shape[:2], features), jnp.float32)
        for cell, weight in _taps(shapes, locations, weights):
            taken = rows.at[cell * heads + jnp.arange(heads)].get(mode="promise_in_bounds")
            total += taken.astype(jnp.float32) * weight[..., None]
        return total.reshape(len(total), heads * features).astype(value.dtype)

    return jax.vmap(of_image)(value, locations, weights)


def _taps(shapes: Shapes, locations: jax.Array, weights: jax.Array) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Cells (Q, H) and their weights (Q, H), four for each point of each level; weights are 0 outside of the level."""
    start = 0
    for level, (height, width) in enumerate(shapes):
        for point in range(locations.shape[3]):
            x, y = (locations[:, :, level, point, axis] * side - 0.5 for axis, side in enumerate((width, height)))
            left, top = jnp.floor(x), jnp.floor(y)
            for row, weight_y in ((top, top + 1 - y), (top + 1, y - top)):
                for column, weight_x in ((left, left + 1 - x), (left + 1, x - left)):
                    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
                    cell = start + row * width + column
                    weight = weight_y * weight_x * weights[:, :, level, point]
                    yield jnp.where(inside, cell, 0).astype(jnp.int32), jnp.where(inside, weight, 0)
        start += height * width


def multi_scale_sampling_reference(
    value: Float[Array, "batch S H D"],
    shapes: Shapes,
    locations: Float[Array, "batch Q H L P 2"],
    weights: Float[Array, "batch Q H L P"],
) -> Float[Array, "batch Q H*D"]:
    """The definition: every cell counts by its overlap with a cell around the location, along each axis."""
    total, start = jnp.zeros((), jnp.float32), 0
    for level, (height, width) in enumerate(shapes):
        cells = value[:, start : start + height * width].reshape(len(value), height, width, *value.shape[2:])
        overlaps = []
        for axis, side in enumerate((width, height)):
            centre = locations[:, :, :, level, :, axis, None] * side - 0.5
            overlaps.append(jnp.maximum(0, 1 - jnp.abs(centre - jnp.arange(side))))
        of_level = weights[:, :, :, level]
        total += jnp.einsum("bqhp,bqhpx,bqhpy,byxhd->bqhd", of_level, *overlaps, cells.astype(jnp.float32))
        start += height * width
    return total.reshape(*total.shape[:2], -1).astype(value.dtype)
