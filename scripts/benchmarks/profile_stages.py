"""Where the time of an evaluation or of gate training goes: each stage by itself, and the run in which they overlap."""

import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from detr_jax.data.batches import CachedBatches, ImageBatches
from detr_jax.data.dataset import Dataset
from detr_jax.data.features import embed_batch
from detr_jax.data.loading import Batch, layout_batches, load_batch
from detr_jax.errors import InputError
from detr_jax.evaluation.coco_ap import score
from detr_jax.evaluation.runs import coco_results, predictions
from detr_jax.methods import MGS
from detr_jax.models import DETR, FFNTrace, FFNWeights, ImageTokens, Selection, Selectors
from detr_jax.models.ffn import forward
from detr_jax.search.timing import interleaved_times
from detr_jax.training.gates import train_gates
from detr_jax.viz.tables import table

HOST = ("decoding", "scoring")
"""Stages of the host; it decodes in the background and scores at the end."""


@dataclass(frozen=True)
class StageTimes:
    """Seconds per batch.

    Attributes:
        shape: (batch, height, width) of the images.
        stages: of each stage by itself, waited for; the device's in the order in which they run.
        run: of a whole run, from one batch to the next, in which stages overlap.
    """

    shape: tuple[int, int, int]
    stages: dict[str, float]
    run: float

    @property
    def busy(self) -> float:
        """What the device does for a batch, transfers included."""
        return sum(seconds for name, seconds in self.stages.items() if name not in HOST)

    @property
    def waiting(self) -> float:
        """What is left of a batch's time when the device has done its work."""
        return max(self.run - self.busy, 0)


@jax.jit
def _transform(model: DETR, tokens: ImageTokens, selectors: Selectors) -> Any:
    return model.transform(tokens, selectors=selectors)


@jax.jit
def _traces(model: DETR, tokens: ImageTokens, selectors: Selectors) -> dict[str, FFNTrace]:
    return model.traces(tokens, selectors)


@jax.jit
def _ffns(
    weights: dict[str, FFNWeights], inputs: dict[str, tuple[jax.Array, jax.Array]], selectors: Selectors
) -> dict[str, jax.Array]:
    def run(name: str, x: jax.Array, tokens: jax.Array) -> jax.Array:
        selector = selectors.get(name)
        return forward(weights[name], x, Selection() if selector is None else selector(weights[name], x, tokens))

    return {name: run(name, *given) for name, given in inputs.items()}


_detections = jax.jit(lambda model, outputs, sizes: model.detections(outputs, sizes))


def evaluation_stages(
    model: DETR, dataset: Dataset, batch_size: int, selectors: Selectors, repeats: int, around_run: Callable[[], Any]
) -> StageTimes:
    """Times an evaluation.

    Args:
        model: the detector, on one device.
        dataset: images; stages are timed with the most frequent shape of their batches.
        batch_size: images per batch.
        selectors: selector of each sparse FFN by name.
        repeats: measured turns of each stage; medians count.
        around_run: makes the context in which the run is timed, such as a profiler's.

    Raises:
        ValueError: if there are fewer than `_LEAST_BATCHES` batches of that shape.
    """
    shape = _most_frequent_shape(dataset, model, batch_size)
    batch, calls, tokens = _forward_stages(model, dataset, batch_size, shape, selectors)
    outputs = _transform(model, tokens, selectors)

    def finish() -> None:
        coco_results(batch, jax.device_get(_detections(model, outputs, batch.sizes)))

    stages = _medians(calls | {"post-processing": finish}, repeats)
    passes = predictions(model, dataset, batch_size, selectors=selectors, progress=False)
    results: list[dict] = []
    with around_run():
        seen = _intervals(_collecting(passes, results), shape)
    started = time.perf_counter()
    score(dataset.ground_truth(), results, dataset.image_ids())
    count = len(layout_batches(dataset.image_sizes(), model.preprocessing, batch_size))
    return StageTimes(shape, stages | {"scoring": (time.perf_counter() - started) / count}, seen)


def training_stages(
    model: DETR, dataset: Dataset, batch_size: int, group_size: int, repeats: int, around_run: Callable[[], Any]
) -> StageTimes:
    """Times gate training (MGS); arguments as of `evaluation_stages`, and the neurons per group."""
    shape = _most_frequent_shape(dataset, model, batch_size)
    _, calls, tokens = _forward_stages(model, dataset, batch_size, shape, {})
    stages = _medians(calls, repeats)
    stored = CachedBatches([tokens] * (repeats + _WARM_UP + 1))  # times are differences
    steps = _step_times(model, stored, group_size, batch_size)
    forward_pass = stages["transformer without FFNs"] + stages["FFNs"]
    stages["gates"] = max(statistics.median(steps[_WARM_UP:]) - forward_pass, 0)
    with around_run():
        run = _step_times(model, ImageBatches(model, dataset, batch_size, shuffle_seed=0), group_size, batch_size)
    return StageTimes(shape, stages, statistics.median(run[_WARM_UP:]))


_WARM_UP = 2
_LEAST_BATCHES = _WARM_UP + 3


def _most_frequent_shape(dataset: Dataset, model: DETR, batch_size: int) -> tuple[int, int, int]:
    layouts = layout_batches(dataset.image_sizes(), model.preprocessing, batch_size)
    shape, count = Counter(layout.shape for layout in layouts).most_common(1)[0]
    if count < _LEAST_BATCHES:
        raise InputError(
            f"{len(dataset)} images make {count} batches of the shape {shape}, and timing takes {_LEAST_BATCHES}; use "
            "more images or smaller batches"
        )
    return shape


def _forward_stages(
    model: DETR, dataset: Dataset, batch_size: int, shape: tuple[int, int, int], selectors: Selectors
) -> tuple[Batch, dict[str, Callable[[], Any]], ImageTokens]:
    """A batch, the stages of its forward pass, and its tokens."""

    sizes, ids = dataset.image_sizes(), np.array(dataset.image_ids())
    layout = next(lay for lay in layout_batches(sizes, model.preprocessing, batch_size) if lay.shape == shape)
    load = partial(load_batch, dataset, model.preprocessing, layout, sizes, ids, slice(0, batch_size))
    batch = load()
    pixels = (batch.pixel_values, batch.pixel_mask)
    placed = replace(batch, pixel_values=jax.device_put(pixels[0]), pixel_mask=jax.device_put(pixels[1]))
    tokens = embed_batch(model, placed, None)
    weights = jax.jit(DETR.ffn_weights)(model)
    inputs = {name: (t.inputs, t.tokens) for name, t in _traces(model, tokens, selectors).items()}
    return (
        batch,
        {
            "decoding": load,
            "transfer": lambda: jax.block_until_ready(jax.device_put(pixels)),
            "backbone": lambda: jax.block_until_ready(embed_batch(model, placed, None)),
            "transformer": lambda: jax.block_until_ready(_transform(model, tokens, selectors)),
            "FFNs": lambda: jax.block_until_ready(_ffns(weights, inputs, selectors)),
        },
        tokens,
    )


def _medians(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    medians = {name: statistics.median(seconds) for name, seconds in interleaved_times(calls, repeats).items()}
    # The FFNs are a part of the transformer that is timed by itself.
    renamed = {"transformer": "transformer without FFNs"}
    medians["transformer"] = max(medians["transformer"] - medians["FFNs"], 0)
    return {renamed.get(name, name): seconds for name, seconds in medians.items()}


def _collecting(passes: Iterable[tuple], results: list[dict]) -> Iterable[Batch]:
    for batch, _, detections, *_ in passes:
        results += coco_results(batch, detections)
        yield batch


def _intervals(run: Iterable[Batch], shape: tuple[int, int, int]) -> float:
    """Median seconds from one batch to the next one of a shape."""
    times = [(time.perf_counter(), batch.pixel_mask.shape) for batch in run]
    spans = [after - before for (before, _), (after, of) in itertools.pairwise(times) if of == shape]
    return float(np.median(spans[_WARM_UP:]))


def _step_times(model: DETR, passes: ImageBatches | CachedBatches, group_size: int, batch_size: int) -> list[float]:
    """Seconds of every step but the first."""
    times: list[float] = []

    def report(step: int, loss: jax.Array) -> None:
        float(loss)  # waits for the step
        times.append(time.perf_counter())

    method = MGS(group_size, epochs=1)
    with tempfile.TemporaryDirectory() as folder:
        train_gates(model, passes, {"mgs": method}, Path(folder), report, checkpoint_steps=len(passes))
    return np.diff(times).tolist()


def stage_table(times: StageTimes) -> str:
    """The stages for people, in milliseconds a batch and as a share of the run."""
    rows = [[name, "host" if name in HOST else "device", 1e3 * s, s] for name, s in times.stages.items()]
    totals = (("sum of the device's", times.busy), ("the run", times.run), ("waiting", times.waiting))
    rows += [[name, "", 1e3 * seconds, seconds] for name, seconds in totals]
    return table(
        ("stage", "of the", "ms a batch", "share of the run"),
        [[name, where, f"{ms:.2f}".rjust(10), f"{100 * s / times.run:.0f} %".rjust(16)] for name, where, ms, s in rows],
    )
