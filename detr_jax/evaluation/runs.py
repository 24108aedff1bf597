"""Running a detector over a data set."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from detr_jax.calibration.sensitivity import output_divergence
from detr_jax.data.dataset import Dataset, Json
from detr_jax.data.features import BackboneFeatures, embed_batch
from detr_jax.data.loading import Batch, batches
from detr_jax.data.prefetch import dispatch_ahead
from detr_jax.errors import InputError
from detr_jax.evaluation.counts import ActivityCounts, count_activity, total_counts
from detr_jax.evaluation.inspection import executed_share
from detr_jax.mesh import local_slice, map_shards, mesh_of, replicate_like, shard_batch, to_host
from detr_jax.models import Detector, FFNTrace, Outputs, Selectors
from detr_jax.models.detections import Detections

Measure = Callable[[dict[str, FFNTrace]], Any]
"""Of the traces of a batch, arrays with an axis of images or one entry for the device in front; hashable."""


@partial(jax.jit, static_argnames=("measure", "mesh"))
def detect(
    model: Detector,
    features: Any,
    sizes: jax.Array,
    selectors: Selectors | None = None,
    *,
    measure: Measure | None = None,
    mesh: Mesh | None = None,
) -> tuple[Outputs, Detections, Any]:
    """Outputs and detections of one batch, and what `measure` makes of the traces of its FFNs.

    Compiled once per shape and kind of detector, not per value of its weights or selectors. `features` are from
    `Detector.embed`, `sizes` (batch, 2) the original heights and widths; the devices of a `mesh` share the batch.
    """

    def of_images(held: Any, images: Any) -> tuple[Outputs, Detections, Any]:
        (model, selectors), (features, sizes) = held, images
        outputs = model.transform(features, selectors=selectors, trace=measure is not None)
        measured = None if measure is None else measure(outputs.traces)
        outputs = dataclasses.replace(outputs, traces=None)
        return outputs, model.detections(outputs, sizes), measured

    return map_shards(mesh, of_images)((model, selectors), (features, sizes))


def predictions(
    model: Detector,
    dataset: Dataset,
    batch_size: int,
    *,
    selectors: Selectors | None = None,
    exact: bool = False,
    progress: bool = True,
    measure: Measure | None = None,
) -> Iterator[tuple[Batch, Outputs, Detections, Any]]:
    """Outputs and detections for every image of a data set, batch by batch, as numpy arrays, with those of `measure`.

    `exact` means without padding, which compiles for every size of image; `progress` shows a bar.

    Raises:
        InputError: if a score is not finite, or the devices of the detector cannot share a batch.
    """
    mesh = mesh_of(model)
    selectors = replicate_like(model, selectors)

    def compute(batch: Batch) -> tuple[Batch, tuple[Outputs, Detections, Any]]:
        sizes = shard_batch(mesh, batch.sizes[batch.own])
        return batch, detect(model, embed_batch(model, batch, mesh), sizes, selectors, measure=measure, mesh=mesh)

    loaded = batches(dataset, model.preprocessing, batch_size, exact=exact, mesh=mesh)
    with tqdm(total=len(dataset), unit="image", disable=not progress) as bar:
        for batch, computed in dispatch_ahead(map(compute, loaded)):
            outputs, detections, measured = to_host(computed)
            _check_finite(batch, detections)
            yield batch, outputs, detections, measured
            bar.update(int(batch.valid.sum()))


def coco_results(batch: Batch | BackboneFeatures, detections: Detections) -> list[Json]:
    """Detections in COCO's results format, one for every object query of every valid image."""
    corners = np.asarray(detections.boxes, np.float64)
    boxes = np.concatenate([corners[..., :2], corners[..., 2:] - corners[..., :2]], axis=-1)
    return [
        {"image_id": int(batch.image_ids[i]), "category_id": label, "bbox": box, "score": score}
        for i in np.flatnonzero(batch.valid)
        for label, box, score in zip(
            detections.labels[i].tolist(), boxes[i].tolist(), detections.scores[i].tolist(), strict=True
        )
    ]


@dataclass(frozen=True)
class _CountActivity:
    """Activity counts of every FFN and the share of it that is executed, per device."""

    group_size: int

    def __call__(self, traces: dict[str, FFNTrace]) -> tuple[dict[str, ActivityCounts], dict[str, jax.Array]]:
        counts = {name: count_activity(trace, self.group_size) for name, trace in traces.items()}
        executed = {name: executed_share(trace) for name, trace in traces.items()}
        return jax.tree.map(lambda count: count[None], (counts, executed))


@dataclass(frozen=True)
class MeasuredDetections:
    """Detections of a data set, and the activity of the FFNs while they were made.

    Attributes:
        results: in COCO's results format.
        counts: of every FFN by name in the order in which they run, in the forward passes that the selectors acted on.
        executed: of every FFN by name, see `detr_jax.evaluation.inspection.executed_share`; mean over images.
        divergence: mean over the images of the divergence of the outputs from those of the first selection; 0 for it.
    """

    results: list[Json]
    counts: dict[str, ActivityCounts]
    executed: dict[str, float]
    divergence: float


def measure_dataset(
    model: Detector, embedded: Iterable[BackboneFeatures], *, selectors: Selectors, group_size: int
) -> MeasuredDetections:
    """As `measure_selections`, with one selection."""
    return measure_selections(model, embedded, {"": selectors}, group_size=group_size)[""]


def measure_selections(
    model: Detector, embedded: Iterable[BackboneFeatures], selections: Mapping[str, Selectors], *, group_size: int
) -> dict[str, MeasuredDetections]:
    """Detections and activity counts with each of several selections by title, in one pass over the images.

    Counts are of groups of `group_size` neurons.

    Raises:
        InputError: if a score is not finite.
    """
    mesh, measure = mesh_of(model), _CountActivity(group_size)
    selections = {title: replicate_like(model, dict(selectors)) for title, selectors in selections.items()}

    def compute(batch: BackboneFeatures) -> tuple[BackboneFeatures, dict[str, tuple[Any, ...]]]:
        images = shard_batch(mesh, (batch.tokens, batch.sizes[local_slice(mesh, len(batch.sizes))]))
        computed, reference = {}, None
        for title, selectors in selections.items():
            outputs, *found = detect(model, *images, selectors, measure=measure, mesh=mesh)
            if reference is None:
                reference, divergence = outputs, np.zeros(len(batch.sizes), np.float32)
            else:
                divergence = output_divergence(model, reference, outputs)
            computed[title] = *found, divergence
        return batch, computed

    found: dict[str, list[tuple[Any, ...]]] = {title: [] for title in selections}
    images = []
    for batch, computed in dispatch_ahead(map(compute, embedded)):
        images.append(int(batch.valid.sum()))
        for title, (detections, activity, divergence) in to_host(computed).items():
            _check_finite(batch, detections)
            found[title].append((coco_results(batch, detections), *activity, divergence[batch.valid]))
    return {title: _total(list(model.ffn_specs()), images, of) for title, of in found.items()}


def _total(names: list[str], images: list[int], found: Iterable[tuple[Any, ...]]) -> MeasuredDetections:
    """The sums and means over batches."""
    results, counts, executed, divergence = zip(*found, strict=True)
    totals = total_counts(counts)
    return MeasuredDetections(
        [result for of_batch in results for result in of_batch],
        {name: totals[name] for name in names},
        {name: float(np.average([of_batch[name].mean() for of_batch in executed], weights=images)) for name in names},
        float(np.concatenate(divergence).mean()),
    )


def _check_finite(batch: Batch | BackboneFeatures, detections: Detections) -> None:
    if not np.isfinite(detections.scores).all():
        raise InputError(f"the detector's scores for images {batch.image_ids.tolist()} are not finite")
