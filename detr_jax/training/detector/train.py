"""Training the embedded detectors on generated scenes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from detr_jax.data.dataset import Example
from detr_jax.data.scenes import SIDES, ScenesDataset, max_objects
from detr_jax.data.transforms import normalise
from detr_jax.errors import InputError, require_counts
from detr_jax.models import DETR, DeformableDETR, DetrConfig
from detr_jax.models.deformable_detr.transformer import FIRST_CLASS, first_heads
from detr_jax.models.detr.matching import Targets, padded_targets
from detr_jax.models.registry import build_detector
from detr_jax.models.resnet import ResNet
from detr_jax.training.checkpoints import train_resumably
from detr_jax.training.detector.dense_head import DenseHead, token_centres
from detr_jax.training.detector.finetune import is_trained
from detr_jax.training.detector.losses import dense_loss, detection_loss, hoyer_penalty
from detr_jax.training.detector.optimiser import adamw_of_parts

ScenesBatch = tuple[Any, Targets]
"""Images (batch, side, side, 3) uint8, and their objects."""
TrainedHere = DETR | DeformableDETR
Losses = dict[str, jax.Array]


@dataclass(frozen=True)
class DetectorTraining:
    """How a detector is trained on scenes. Every step sees new scenes."""

    steps: int = 26000
    batch_size: int = 16
    last_steps: int = 0
    """So many of the steps, the last ones, are on scenes of 256 pixels a side instead of 128 ..."""
    last_batch_size: int = 4
    """... in batches of this size."""
    backbone: str | None = None
    """Name of a detector whose backbone this one begins with; its stem, first stage and batch norms stay as they are,
    as in fine-tuning. None begins with random parameters."""
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
        require_counts(self, "steps", "batch_size", "last_batch_size", "checkpoint_steps")
        if not 0 <= self.last_steps <= self.steps:
            raise InputError(f"last_steps must be from 0 to steps {self.steps}, not {self.last_steps}")
        if not 0 <= self.warmup_steps < self.steps:
            raise InputError(f"warmup_steps must be from 0 to below steps {self.steps}, not {self.warmup_steps}")
        if not self.hoyer_start < self.hoyer_full:
            raise InputError(f"hoyer_start {self.hoyer_start} must be below hoyer_full {self.hoyer_full}")

    def images(self, steps: int) -> int:
        """Scenes that so many first steps see."""
        large = max(0, steps - (self.steps - self.last_steps))
        return (steps - large) * self.batch_size + large * self.last_batch_size


RECIPES = {
    "detr-tiny": DetectorTraining(),
    "deformable-tiny": DetectorTraining(
        steps=4400,
        last_steps=1200,
        backbone="detr-tiny",
        learning_rate=8e-4,
        backbone_learning_rate=4e-4,
        hoyer_weight=30.0,
    ),
}
"""Of the embedded detectors, by their presets."""


def targets_of(examples: list[Example]) -> Targets:
    """The objects of square scenes of one size, padded, with boxes as fractions of the image."""
    side = len(examples[0].image)

    def objects(example: Example) -> tuple[np.ndarray, np.ndarray]:
        low, high = example.boxes[:, :2] / side, example.boxes[:, 2:] / side
        return example.labels, np.concatenate([(low + high) / 2, high - low], axis=1)

    return padded_targets(map(objects, examples), (len(examples), max_objects(side)))


def training_batches(training: DetectorTraining, start: int) -> Iterator[ScenesBatch]:
    """Batches from step `start` on."""
    change = training.steps - training.last_steps
    small, large = (ScenesDataset("train", images=training.images(training.steps), side=side) for side in SIDES)

    def load_batch(step: int) -> ScenesBatch:
        in_small = step < change
        dataset, size = (small, training.batch_size) if in_small else (large, training.last_batch_size)
        first = (step if in_small else step - change) * size
        examples = [dataset[i] for i in range(first, first + size)]
        return np.stack([e.image for e in examples]), targets_of(examples)

    steps = grain.MapDataset.range(start, training.steps).map(load_batch)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def hoyer_weight(training: DetectorTraining, step: jax.Array) -> jax.Array:
    """Weight of the penalty at a step."""
    progress = step / training.steps
    ramp = (progress - training.hoyer_start) / (training.hoyer_full - training.hoyer_start)
    return training.hoyer_weight * jnp.clip(ramp, 0, 1)


def optimiser(training: DetectorTraining) -> optax.GradientTransformation:
    """AdamW on clipped gradients, with a learning rate of its own for the backbone."""

    def schedule(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0, peak, training.warmup_steps, training.steps, peak / 100)

    rates = schedule(training.backbone_learning_rate), schedule(training.learning_rate)
    return adamw_of_parts(*rates, training.weight_decay, training.gradient_norm)


def fit_batch_norm(model: TrainedHere, images: np.ndarray) -> None:
    """Gives the frozen batch norm of a new backbone the statistics of a batch of (batch, height, width, 3) images."""
    model.backbone.set_attributes(fit=True)
    model.backbone(jnp.asarray(normalise(images, model.preprocessing)))
    model.backbone.set_attributes(fit=False)


def untrained(
    config: DetrConfig, training: DetectorTraining, backbone: ResNet | None
) -> tuple[TrainedHere, nnx.List[DenseHead]]:
    """A detector to train, and the heads for the tokens before the encoder and, unless its own serve, behind it."""
    model = cast(TrainedHere, build_detector(config, rngs=nnx.Rngs(training.seed)))
    if backbone is None:
        fit_batch_norm(model, next(training_batches(training, 0))[0])
    else:
        nnx.update(model.backbone, nnx.state(backbone))
    heads = [DenseHead(config, rngs=nnx.Rngs(training.seed + 1))]
    if isinstance(model, DeformableDETR):
        first_heads(model.transformer)
        heads.append(DenseHead(config, rngs=nnx.Rngs(training.seed + 2)))
        for head in heads:
            head.class_head.bias = nnx.Param(jnp.full(config.logits, FIRST_CLASS))
    return model, nnx.List(heads)


def _losses(
    parameters: Any, graph: Any, rest: Any, training: DetectorTraining, batch: ScenesBatch, step: jax.Array
) -> tuple[jax.Array, Losses]:
    """The weighted sum of the losses, and each by name."""
    images, targets = batch
    model, dense_heads = nnx.merge(graph, parameters, rest)
    sigmoid = isinstance(model, DeformableDETR)
    outputs = model(normalise(images, model.preprocessing), auxiliary=True, trace=True)
    centres = token_centres(model.token_grids(images.shape[1:3]))
    before, after = outputs.encoder
    # DETR's encoder finds out where its tokens are: what the decoder reads must say so in the heads' own terms.
    # Deformable DETR's heads speak of points that queries look around.
    last = dense_heads[1](after, centres) if sigmoid else model.heads(after)
    predictions = (dense_heads[0](before, centres), last)
    loss_before, loss_after = (
        dense_loss(logits, boxes, centres, targets, sigmoid=sigmoid) for logits, boxes in predictions
    )
    dense = loss_before + loss_after
    detection = detection_loss(outputs, targets, sigmoid=sigmoid)
    parts = {"detection": detection, "dense": dense, "hoyer": hoyer_penalty(outputs.traces)}
    total = parts["detection"] + training.dense_weight * dense + hoyer_weight(training, step) * parts["hoyer"]
    return total, parts


@partial(jax.jit, static_argnames=("graph", "training", "mesh"))
def take_step(
    state: Any, rest: Any, batch: ScenesBatch, step: jax.Array, *, graph: Any, training: DetectorTraining, mesh: Mesh
) -> tuple[Any, Losses]:
    """Parameters and the optimiser's memory after a step on a batch that devices share, and the losses by name."""

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("batch"), P()), out_specs=P(), check_vma=False)
    def step_of_shard(state: Any, batch: ScenesBatch, step: jax.Array) -> tuple[Any, Losses]:
        parameters, memory = state
        gradients, parts = jax.grad(_losses, has_aux=True)(parameters, graph, rest, training, batch, step)
        gradients, parts = jax.lax.pmean((gradients, parts), "batch")
        updates, memory = optimiser(training).update(gradients, memory, parameters)
        return (optax.apply_updates(parameters, updates), memory), parts

    return step_of_shard(state, batch, step)


def train_detector(
    config: DetrConfig,
    training: DetectorTraining,
    folder: Path,
    report: Callable[[int, dict[str, float]], None],
    backbone: ResNet | None = None,
) -> TrainedHere:
    """Trains from random parameters, or from the latest checkpoint in `folder`.

    The detector's images are the scenes' pixels. `report` is called with the step and its losses after every step that
    was taken. `backbone` is that of `training.backbone`.
    """
    is_parameter = nnx.Param if backbone is None else nnx.All(nnx.Param, _is_trained)
    graph, *states = nnx.split(untrained(config, training, backbone), is_parameter, ...)
    parameters, rest = states
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    # Placed as the step returns it, so that the step is compiled once.
    state = jax.device_put((parameters, optimiser(training).init(parameters)), NamedSharding(mesh, P()))

    static = {"graph": graph, "training": training, "mesh": mesh}

    def report_step(taken: int, losses: dict[str, float] | None) -> None:
        if losses is not None:
            report(taken - 1, losses)

    parameters, _ = train_resumably(
        lambda state, batch, taken: take_step(state, rest, batch, taken - 1, **static),
        *(state, partial(training_batches, training), training.steps, folder, report_step),
        checkpoint_steps=training.checkpoint_steps,
    )
    return nnx.merge(graph, parameters, rest)[0]


def _is_trained(path: tuple[Any, ...], value: Any) -> bool:
    """As in fine-tuning, of a detector and the heads beside it."""
    return path[0] != 0 or is_trained(path[1:], value)
