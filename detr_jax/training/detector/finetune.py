"""Fine-tuning a trained detector on other images and classes, as DETR was trained (Carion et al. 2020)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from detr_jax.data.augment import AugmentedBatches, TrainingBatch, Views
from detr_jax.errors import InputError, require_choices, require_counts
from detr_jax.mesh import mesh_of, on_every_device, replicate_like, sum_shards
from detr_jax.models import DETR
from detr_jax.training.checkpoints import train_resumably
from detr_jax.training.detector.losses import BatchCounts, detection_loss
from detr_jax.training.detector.optimiser import adamw_of_parts
from detr_jax.training.gates import batches_from


@dataclass(frozen=True)
class FineTuning:
    """Options of fine-tuning. Rates, decay and clipping are the official ones, for batches of 64 images."""

    epochs: int = 50
    """Passes over the training images."""
    batch_size: int = 8
    """Images per step, over all devices."""
    learning_rate: float = 1e-4
    """Of the transformer and the heads."""
    backbone_learning_rate: float = 1e-5
    """Of the backbone; its stem, its first stage and its batch norms are frozen."""
    lr_drop: int = 40
    """Epochs after which both learning rates are divided by 10."""
    weight_decay: float = 1e-4
    gradient_norm: float = 0.1
    """Gradients are clipped to this norm."""
    views: Views = "official"
    """Of the images: official draws parts and sizes, mirrored whole images of the detector's own size, half of them
    mirrored, and whole just these."""
    eval_epochs: int = 1
    """Epochs between evaluations on the validation split, of which the best detector is kept."""
    patience: int = 10
    """Evaluations without a better AP after which training ends."""
    accumulation: int = 1
    """Parts that every device computes its images of a step in, one after the other: less memory, the same steps."""
    remat: bool = False
    """Compute what is inside blocks of the backbone and attention again for gradients: less memory, more time."""
    seed: int = 0
    """Of the order of images and their random views, and of the weights of new classes."""
    checkpoint_steps: int = 500
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        counts = ("epochs", "batch_size", "lr_drop", "eval_epochs", "patience", "accumulation", "checkpoint_steps")
        require_counts(self, *counts)
        require_choices(self, "views")


def check_parts(training: FineTuning, mesh: Mesh | None) -> None:
    """Raises an InputError if the images of a batch on one device cannot be computed in equal parts."""
    devices = 1 if mesh is None else mesh.size
    if training.batch_size % (devices * training.accumulation):
        raise InputError(
            f"a batch of {training.batch_size} images on {devices} device{'s' * (devices > 1)} cannot be computed in "
            f"{training.accumulation} parts; its size has to be a multiple of {devices * training.accumulation}"
        )


def is_trained(path: tuple[Any, ...], _: Any) -> bool:
    """True for parameters that are trained: all but the backbone's stem, first stage and batch norms."""
    if path[0] != "backbone":
        return True
    return path[1] == "stages" and path[2] > 0 and "norm" not in path


def step_graph(model: DETR, *, remat: bool) -> Any:
    """The graph of a detector for `take_step`."""
    copy = nnx.clone(model)
    copy.set_attributes(remat=remat)
    return nnx.graphdef(copy)


@lru_cache
def optimiser(training: FineTuning, epoch_steps: int) -> optax.GradientTransformation:
    """The official optimiser; the same object for the same settings, as jit wants it."""

    def schedule(rate: float) -> optax.Schedule:
        return optax.piecewise_constant_schedule(rate, {training.lr_drop * epoch_steps: 0.1})

    rates = schedule(training.backbone_learning_rate), schedule(training.learning_rate)
    return adamw_of_parts(*rates, training.weight_decay, training.gradient_norm)


@partial(jax.jit, static_argnames=("graph", "optimise", "accumulation", "mesh"))
def take_step(
    state: Any,
    frozen: Any,
    batch: TrainingBatch,
    *,
    graph: Any,
    optimise: optax.GradientTransformation,
    accumulation: int,
    mesh: Mesh | None,
) -> tuple[Any, jax.Array]:
    """Trained parameters and the optimiser's memory after a step on a batch that devices share, and its loss.

    The loss is averaged over the whole batch, so that neither devices nor `accumulation` change the step.
    """
    parameters, memory = state
    images, queries = batch.targets.valid.shape[0], nnx.merge(graph, parameters, frozen).queries
    counts = BatchCounts(images * queries, batch.targets.valid.sum())

    def of_shard(replicated: Any, images: TrainingBatch) -> tuple[jax.Array, Any]:
        parameters, frozen, objects = replicated

        @jax.value_and_grad
        def loss_of(parameters: Any, part: TrainingBatch) -> jax.Array:
            outputs = nnx.merge(graph, parameters, frozen)(part.pixel_values, part.pixel_mask, auxiliary=True)
            return detection_loss(outputs, part.targets, counts._replace(objects=objects))

        if accumulation == 1:
            return loss_of(parameters, images)
        parts = jax.tree.map(lambda array: array.reshape(accumulation, -1, *array.shape[1:]), images)
        zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, parameters)
        return jax.lax.scan(
            lambda total, part: (jax.tree.map(jnp.add, total, loss_of(parameters, part)), None), zero, parts
        )[0]

    loss, gradients = sum_shards(mesh, of_shard)((parameters, frozen, counts.objects), batch)
    updates, memory = optimise.update(gradients, memory, parameters)
    return on_every_device(((optax.apply_updates(parameters, updates), memory), loss), mesh)


def fine_tune(
    model: DETR,
    batches: AugmentedBatches,
    training: FineTuning,
    folder: Path,
    report: Callable[[int, jax.Array | None], None],
    is_enough: Callable[[int, DETR], bool],
) -> DETR:
    """Fine-tunes a detector, or resumes from the latest checkpoint in `folder`; returns it after the last step.

    Devices that the model is replicated over share every batch, see `detr_jax.mesh`. Dropout is not applied, which the
    official training has: detectors are in inference form.

    Args:
        model: with the classes of the data; stays as it is.
        batches: of the training images.
        folder: for checkpoints.
        report: called after every step with the number of steps taken so far and the loss; once with None when
            training resumes.
        is_enough: called with the number of epochs and the detector after every `eval_epochs` and the last one;
            training ends if it says so. After a resumption it is called again for an epoch that just ended.
    """
    graph, *states = nnx.split(model, is_trained, ...)
    parameters, frozen = states
    graph_of_step = step_graph(model, remat=training.remat)
    epoch_steps, steps = len(batches), training.epochs * len(batches)
    optimise, mesh = optimiser(training, epoch_steps), mesh_of(model)
    memory = replicate_like(model, optimise.init(parameters))

    def stop(step: int, state: Any) -> bool:
        epoch, rest = divmod(step, epoch_steps)
        if rest or (epoch % training.eval_epochs and step != steps):
            return False
        return is_enough(epoch, nnx.merge(graph, state[0], frozen))

    static: dict[str, Any] = {"optimise": optimise, "accumulation": training.accumulation, "mesh": mesh}
    trained, _ = train_resumably(
        lambda state, batch, step: take_step(state, frozen, batch, graph=graph_of_step, **static),
        *((parameters, memory), partial(batches_from, batches, training.epochs), steps, folder, report),
        checkpoint_steps=training.checkpoint_steps,
        stop=stop,
    )
    return nnx.merge(graph, trained, frozen)
