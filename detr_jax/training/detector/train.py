"""Training the embedded detector from scratch on generated scenes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from detr_jax.data.dataset import Example
from detr_jax.data.scenes import MAX_OBJECTS, SIDE, ScenesDataset
from detr_jax.data.transforms import normalise
from detr_jax.errors import InputError, require_counts
from detr_jax.models import DETR, DetrConfig
from detr_jax.models.detr.matching import Targets
from detr_jax.training.checkpoints import train_resumably
from detr_jax.training.detector.dense_head import DenseHead
from detr_jax.training.detector.losses import dense_loss, detection_loss, hoyer_penalty

ScenesBatch = tuple[Any, Targets]
"""Images (batch, 128, 128, 3) uint8, and their objects."""
Losses = dict[str, jax.Array]


@dataclass(frozen=True)
class DetectorTraining:
    """How a detector is trained on scenes. Every step sees new scenes."""

    steps: int = 26000
    batch_size: int = 16
    learning_rate: float = 5e-4
    """Peak of the transformer's and the heads' learning rate: a linear warm-up, then a cosine decay."""
    backbone_learning_rate: float = 2e-3
    """Likewise of the backbone."""
    warmup_steps: int = 300
    weight_decay: float = 1e-4
    gradient_norm: float = 1.0
    """Gradients are clipped to this norm."""
    dense_weight: float = 1.0
    """Weight of the dense loss on the tokens before and after the encoder. Without it the set loss stays on its first
    plateau."""
    hoyer_weight: float = 60.0
    """Final weight of the Hoyer-square penalty, which makes the activations as sparse as a published DETR's."""
    hoyer_start: float = 0.4
    """Fraction of the steps after which the penalty starts to ramp up ..."""
    hoyer_full: float = 0.5
    """... and after which it has its full weight."""
    seed: int = 0
    checkpoint_steps: int = 500
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        require_counts(self, "steps", "batch_size", "checkpoint_steps")
        if not 0 <= self.warmup_steps < self.steps:
            raise InputError(f"warmup_steps must be from 0 to below steps {self.steps}, not {self.warmup_steps}")
        if not self.hoyer_start < self.hoyer_full:
            raise InputError(f"hoyer_start {self.hoyer_start} must be below hoyer_full {self.hoyer_full}")


def targets_of(examples: list[Example]) -> Targets:
    """The scenes' objects, padded, with boxes as fractions of the image."""
    labels = np.zeros((len(examples), MAX_OBJECTS), np.int32)
    boxes = np.full((len(examples), MAX_OBJECTS, 4), 0.5, np.float32)
    valid = np.zeros((len(examples), MAX_OBJECTS), bool)
    for i, example in enumerate(examples):
        count = len(example.labels)
        low, high = example.boxes[:, :2] / SIDE, example.boxes[:, 2:] / SIDE
        labels[i, :count] = example.labels
        boxes[i, :count] = np.concatenate([(low + high) / 2, high - low], axis=1)
        valid[i, :count] = True
    return Targets(labels, boxes, valid)


def training_batches(training: DetectorTraining, start: int) -> Iterator[ScenesBatch]:
    """Batches from step `start` on."""
    dataset = ScenesDataset("train", images=training.steps * training.batch_size)

    def load(step: int) -> ScenesBatch:
        first = step * training.batch_size
        examples = [dataset[i] for i in range(first, first + training.batch_size)]
        return np.stack([e.image for e in examples]), targets_of(examples)

    steps = grain.MapDataset.range(start, training.steps).map(load)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def hoyer_weight(training: DetectorTraining, step: jax.Array) -> jax.Array:
    """Weight of the penalty at a step."""
    progress = step / training.steps
    ramp = (progress - training.hoyer_start) / (training.hoyer_full - training.hoyer_start)
    return training.hoyer_weight * jnp.clip(ramp, 0, 1)


def optimiser(training: DetectorTraining) -> optax.GradientTransformation:
    """AdamW on clipped gradients, with a learning rate of its own for the backbone."""

    def adamw(peak: float) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(0, peak, training.warmup_steps, training.steps, peak / 100)
        return optax.adamw(schedule, weight_decay=training.weight_decay)

    def part_of(path: tuple[Any, ...], _: jax.Array) -> str:
        return "backbone" if "backbone" in jax.tree_util.keystr(path) else "rest"

    return optax.chain(
        optax.clip_by_global_norm(training.gradient_norm),
        optax.partition(
            {"backbone": adamw(training.backbone_learning_rate), "rest": adamw(training.learning_rate)},
            partial(jax.tree.map_with_path, part_of),
        ),
    )


def fit_batch_norm(model: DETR, images: np.ndarray) -> None:
    """Gives the frozen batch norm of a new backbone the statistics of a batch of (batch, height, width, 3) images."""
    model.backbone.set_attributes(fit=True)
    model.backbone(jnp.asarray(normalise(images, model.preprocessing)))
    model.backbone.set_attributes(fit=False)


def _losses(
    parameters: Any, graph: Any, statistics: Any, training: DetectorTraining, batch: ScenesBatch, step: jax.Array
) -> tuple[jax.Array, Losses]:
    """The weighted sum of the losses, and each by name."""
    images, targets = batch
    model, dense_head = nnx.merge(graph, parameters, statistics)
    outputs = model(normalise(images, model.preprocessing), auxiliary=True, trace=True)
    grid = (len(images), *model.token_grids(images.shape[1:3])[0])
    before, after = (tokens.reshape(*grid, -1) for tokens in outputs.encoder)
    # The encoder finds out where its tokens are: what the decoder reads must say so in the heads' own terms.
    predictions = (dense_head(before), model.heads(after))
    loss_before, loss_after = (dense_loss(logits, boxes, targets) for logits, boxes in predictions)
    dense = loss_before + loss_after
    parts = {"detection": detection_loss(outputs, targets), "dense": dense, "hoyer": hoyer_penalty(outputs.traces)}
    total = parts["detection"] + training.dense_weight * dense + hoyer_weight(training, step) * parts["hoyer"]
    return total, parts


@partial(jax.jit, static_argnames=("graph", "training", "mesh"))
def take_step(
    state: Any,
    statistics: Any,
    batch: ScenesBatch,
    step: jax.Array,
    *,
    graph: Any,
    training: DetectorTraining,
    mesh: Mesh,
) -> tuple[Any, Losses]:
    """Parameters and the optimiser's memory after a step on a batch that devices share, and the losses by name."""

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("batch"), P()), out_specs=P(), check_vma=False)
    def step_of_shard(state: Any, batch: ScenesBatch, step: jax.Array) -> tuple[Any, Losses]:
        parameters, memory = state
        gradients, parts = jax.grad(_losses, has_aux=True)(parameters, graph, statistics, training, batch, step)
        gradients, parts = jax.lax.pmean((gradients, parts), "batch")
        updates, memory = optimiser(training).update(gradients, memory, parameters)
        return (optax.apply_updates(parameters, updates), memory), parts

    return step_of_shard(state, batch, step)


def train_detector(
    config: DetrConfig, training: DetectorTraining, folder: Path, report: Callable[[int, dict[str, float]], None]
) -> DETR:
    """Trains from random parameters, or from the latest checkpoint in `folder`.

    The detector's images are the scenes' 128x128 pixels. `report` is called with the step and its losses after every
    step that was taken.
    """
    model = DETR(config, rngs=nnx.Rngs(training.seed))
    fit_batch_norm(model, next(training_batches(training, 0))[0])
    dense_head = DenseHead(config, rngs=nnx.Rngs(training.seed + 1))
    graph, *states = nnx.split((model, dense_head), nnx.Param, nnx.BatchStat)
    parameters, statistics = states
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    # Placed as the step returns it, so that the step is compiled once.
    state = jax.device_put((parameters, optimiser(training).init(parameters)), NamedSharding(mesh, P()))

    static = {"graph": graph, "training": training, "mesh": mesh}

    def report_step(taken: int, losses: dict[str, float] | None) -> None:
        if losses is not None:
            report(taken - 1, losses)

    parameters, _ = train_resumably(
        lambda state, batch, taken: take_step(state, statistics, batch, taken - 1, **static),
        *(state, partial(training_batches, training), training.steps, folder, report_step),
        checkpoint_steps=training.checkpoint_steps,
    )
    return nnx.merge(graph, parameters, statistics)[0]
