"""Kinds of tokens: image tokens over no object and over one, object queries without an object and with one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.data.loading import Batch
from detr_jax.models import Detector, FFNSpec
from detr_jax.models.detr.matching import Targets, match, padded_targets

KINDS = {"image": ("background", "object"), "query": ("unmatched", "matched")}
"""Image tokens whose centre is over no object, and over one; object queries that the set matching leaves, and those it
gives an object."""


def object_tokens(batch: Batch, model: Detector) -> tuple[np.ndarray, ...]:
    """(own, tokens) int32 of each grid: 1 for tokens whose centre is over an object, 0 for others, -1 in copies."""
    grids = model.token_grids(batch.pixel_mask.shape[1:])
    return tuple(_object_tokens(batch, *grid, stride) for grid, stride in zip(grids, model.strides, strict=True))


def _object_tokens(batch: Batch, rows: int, columns: int, stride: int) -> np.ndarray:
    y, x = (np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")) + 0.5) * stride
    kinds = np.full((len(batch.pixel_mask), rows, columns), -1, np.int32)
    for i, (boxes, mask, size) in enumerate(zip(batch.boxes, batch.pixel_mask, batch.sizes[batch.own], strict=False)):
        resized = np.array([mask[0].sum(), mask[:, 0].sum()])  # width, height
        x0, y0, x1, y1 = (boxes * np.tile(resized / size[::-1], 2)).T[..., None, None]
        kinds[i] = ((x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)).any(0)
    return kinds.reshape(len(kinds), -1)


def query_targets(batch: Batch, queries: int) -> Targets:
    """The objects of each own image, as many as there are queries at most; the largest, where there are more."""

    def objects(corners: np.ndarray, labels: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        extent, centre = corners[:, 2:] - corners[:, :2], (corners[:, :2] + corners[:, 2:]) / 2
        largest = np.argsort(-extent.prod(1), kind="stable")[:queries]
        return labels[largest], np.concatenate([centre / size, extent / size], axis=1)[largest]

    sizes = batch.sizes[batch.own][: len(batch.boxes), ::-1]
    return padded_targets(map(objects, batch.boxes, batch.labels, sizes), (len(batch.pixel_mask), queries))


def kinds_of_queries(model: Detector, outputs: Any, on_object: tuple[jax.Array, ...], targets: Targets) -> jax.Array:
    """(batch, queries) int32, 1 for queries that the set matching gives an object, -1 in copies; jittable."""
    probabilities, boxes = model.query_predictions(outputs)
    queries = jax.vmap(match)(probabilities, boxes, targets)
    image = jnp.arange(len(boxes))[:, None]
    matched = jnp.zeros(boxes.shape[:2], jnp.int32).at[image, queries].max(targets.valid.astype(jnp.int32))
    return jnp.where(on_object[0][:, :1] >= 0, matched, -1)


def kinds_for(spec: FFNSpec, on_object: tuple[jax.Array, ...], of_queries: jax.Array) -> jax.Array:
    """(batch, tokens) kinds of the tokens of one FFN, from those of all grids and of the queries."""
    return of_queries if spec.tokens == "query" else jnp.concatenate([on_object[grid] for grid in spec.grids], axis=1)
