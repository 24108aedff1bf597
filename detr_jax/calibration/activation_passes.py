"""Activation statistics of FFNs over data: of a detector by what the tokens stand for, or of any carrier of FFNs."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.calibration.accumulate import accumulate
from detr_jax.calibration.activations import (
    ActivationProfile,
    ActivationStatistics,
    load_profile,
    measure,
    save_profile,
)
from detr_jax.data.batches import BatchSource
from detr_jax.data.dataset import Dataset
from detr_jax.data.loading import Batch, batches, layout_batches
from detr_jax.data.prefetch import dispatch_ahead
from detr_jax.errors import InputError
from detr_jax.mesh import is_first_process, mesh_of, shard_batch, to_host
from detr_jax.methods.grouping import group_count
from detr_jax.models import Detector, FFNSpec
from detr_jax.models.base import HasFFNs
from detr_jax.models.detr.matching import Targets, match
from detr_jax.models.parameters import fingerprint

KINDS = {"image": ("background", "object"), "query": ("unmatched", "matched")}
"""Image tokens whose centre is over no object, and over one; object queries that the set matching leaves, and those it
gives an object."""


def profile_activations(
    model: Detector,
    dataset: Dataset,
    batch_size: int,
    group_size: int,
    path: Path,
    report: Callable[[int], None],
    *,
    checkpoint_batches: int = 50,
) -> ActivationProfile:
    """Activation statistics of every FFN on a data set; resumes from what an interrupted pass left at `path`.

    Args:
        model: the detector, which runs dense, on one device or replicated over several by `detr_jax.mesh`.
        dataset: images with their objects.
        batch_size: images per batch, over all devices.
        group_size: neurons per group.
        path: of the safetensors file of the statistics.
        report: called with the number of images of every batch, at the beginning with that of the earlier ones.
        checkpoint_batches: batches after which the file is written.

    Raises:
        ValueError: if the devices cannot share a batch, the group size does not divide the hidden neurons, or the file
            is of another detector, data set, group size or batch size.
    """
    mesh = mesh_of(model)
    kinds = {name: KINDS[spec.tokens] for name, spec in model.ffn_specs().items()}
    for spec in model.ffn_specs().values():
        group_count(spec.hidden, group_size)
    own = fingerprint(model)
    data = f"{dataset.name}, {len(dataset)} images in batches of {batch_size}"
    profile = ActivationProfile(own, data, group_size, kinds, 0, {})
    if path.exists():
        profile = load_profile(path, own)
        if (profile.data, profile.group_size) != (data, group_size):
            raise InputError(
                f"{path} has statistics of {profile.data} in groups of {profile.group_size}, not of {data} in groups "
                f"of {group_size}; choose another file"
            )

    layouts = layout_batches(dataset.image_sizes(), model.preprocessing, batch_size, image_name=dataset.image_name)
    report(sum(len(layout.indices) for layout in layouts[: profile.batches]))

    def compute(batch: Batch) -> tuple[int, dict[str, ActivationStatistics]]:
        own = (
            batch.pixel_values,
            batch.pixel_mask,
            object_tokens(batch, model),
            query_targets(batch, model.queries),
        )
        return int(batch.valid.sum()), _measure_images(model, *shard_batch(mesh, own))

    loaded = batches(dataset, model.preprocessing, batch_size, start=profile.batches, mesh=mesh)
    for images, computed in dispatch_ahead(map(compute, loaded)):
        profile = profile.plus(to_host(computed))
        report(images)
        if (profile.batches % checkpoint_batches == 0 or profile.batches == len(layouts)) and is_first_process():
            save_profile(profile, path)
    return profile


@jax.jit
def _measure_images(model, pixel_values, pixel_mask, on_object, targets):
    outputs = model(pixel_values, pixel_mask, trace=True)
    matched = _matched(*model.query_predictions(outputs), targets)
    of_queries = jnp.where(on_object[0][:, :1] >= 0, matched, -1)

    def token_kinds(spec: FFNSpec) -> jax.Array:
        if spec.tokens == "query":
            return of_queries
        return jnp.concatenate([on_object[grid] for grid in spec.grids], axis=1)

    return {
        name: measure(outputs.traces[name], token_kinds(spec), kinds_count=2)
        for name, spec in model.ffn_specs().items()
    }


def measure_activations(model: HasFFNs, batches: BatchSource, group_size: int) -> dict[str, ActivationStatistics]:
    """Activation statistics of every FFN while it runs dense, all tokens being of one kind.

    Args:
        model: the FFNs.
        batches: data; one pass is made.
        group_size: neurons per group of what is made from them.

    Returns:
        statistics by name of the FFN.

    Raises:
        InputError: if the group size does not divide the hidden neurons, or there are no images.
    """
    for weights in model.ffn_weights().values():
        group_count(len(weights.w_in), group_size)
    return accumulate(_measure_batch, model, batches, "measure activations")


@jax.jit
def _measure_batch(model, batch):
    return {
        name: measure(trace, jnp.zeros_like(trace.tokens, int), kinds_count=1)
        for name, trace in model.traces(batch, {}).items()
    }


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
    shape = (len(batch.pixel_mask), queries)
    labels, boxes, valid = np.zeros(shape, np.int32), np.full((*shape, 4), 0.5, np.float32), np.zeros(shape, bool)
    sizes = batch.sizes[batch.own]
    for i, (corners, classes) in enumerate(zip(batch.boxes, batch.labels, strict=True)):
        extent = corners[:, 2:] - corners[:, :2]
        largest = np.argsort(-extent.prod(1), kind="stable")[:queries]
        size = sizes[i, ::-1]
        centre = (corners[:, :2] + corners[:, 2:]) / 2
        labels[i, : len(largest)] = classes[largest]
        boxes[i, : len(largest)] = np.concatenate([centre / size, extent / size], axis=1)[largest]
        valid[i, : len(largest)] = True
    return Targets(labels, boxes, valid)


def _matched(probabilities: jax.Array, boxes: jax.Array, targets: Targets) -> jax.Array:
    """(batch, queries) int32, 1 for the queries that belong to an object."""
    queries = jax.vmap(match)(probabilities, boxes, targets.labels, targets.boxes, targets.valid)
    image = jnp.arange(len(boxes))[:, None]
    return jnp.zeros(boxes.shape[:2], jnp.int32).at[image, queries].max(targets.valid.astype(jnp.int32))
