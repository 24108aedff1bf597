"""Training gates for all FFNs on frozen weights, of one method or of several in one pass."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from detr_jax.data.batches import BatchSource
from detr_jax.errors import InputError, require_counts
from detr_jax.mesh import mesh_of, on_every_device, replicate_like
from detr_jax.methods import Method, Score, Thresholded, TrainedMethod
from detr_jax.models import HasFFNs
from detr_jax.training.checkpoints import train_resumably

Gates = dict[str, Score]
"""Gate of each FFN by name."""


@dataclass(frozen=True)
class GateTraining:
    """Gate training of commands. Group size and epochs are the paper's defaults; it does not name the optimiser."""

    group_size: int = 8
    """Hidden neurons per gate."""
    epochs: int = 5
    """Passes over the training images."""
    batch_size: int = 8
    """Images per step."""
    learning_rate: float = 3e-3
    """Peak learning rate of Adam, which decays to 0 along a cosine."""
    seed: int = 0
    """Order of the images, and first values of gates with two layers."""
    checkpoint_steps: int = 200
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        require_counts(self, "group_size", "epochs", "batch_size", "checkpoint_steps")

    def method(self, cls: type[Method]) -> Method:
        """A method with these options, as far as it has them."""
        return cls(**{f.name: getattr(self, f.name) for f in dataclasses.fields(cls) if hasattr(self, f.name)})


def train_gates(
    model: HasFFNs,
    batches: BatchSource,
    methods: Mapping[str, TrainedMethod],
    folder: Path,
    report: Callable[[int, jax.Array], None],
    *,
    checkpoint_steps: int = 200,
    active_selectors: Mapping[str, Mapping[str, Thresholded]] | None = None,
) -> dict[str, Gates]:
    """Trains gates of some methods for every FFN, or resumes from the latest checkpoint in `folder`.

    The frozen weights are an argument of the compiled step: no gradient is taken of them and none are returned, so
    they stay as they are, bit for bit. Devices that the model is replicated over share every batch, see
    `detr_jax.mesh`.

    Args:
        model: the frozen FFNs.
        batches: training data.
        methods: by any name; epochs, learning rate and seed must be the same for all.
        folder: for checkpoints.
        report: called after every step with the number of steps taken so far and the mean loss of the gates; once with
            NaN when training resumes.
        checkpoint_steps: steps between checkpoints.
        active_selectors: gates of each method to start from, with thresholds. They are in effect during the training,
            so that each gate learns on the inputs that the others leave it. None trains on the dense FFNs.

    Returns:
        gates of each method, by name of their FFN.

    Raises:
        InputError: if methods differ in epochs, learning rate or seed.
    """
    recipes = {(method.epochs, method.learning_rate, method.seed) for method in methods.values()}
    if len(recipes) != 1:
        raise InputError(f"methods trained together must share epochs, learning rate and seed, not {sorted(recipes)}")
    ((epochs, learning_rate, seed),) = recipes
    total = epochs * len(batches)
    optimiser = adam_with_cosine(learning_rate, total)
    weights = model.ffn_weights()
    keys = dict(zip(weights, jax.random.split(jax.random.key(seed), len(weights)), strict=True))
    active = active_selectors or {}
    gates: dict[str, Gates] = {
        of: {
            name: active[of][name].score if active else method.init((len(ffn.w_in), ffn.w_in.shape[1]), keys[name])
            for name, ffn in weights.items()
        }
        for of, method in methods.items()
    }
    thresholds = {of: {name: one.threshold for name, one in selectors.items()} for of, selectors in active.items()}
    state, thresholds = replicate_like(model, ((gates, optimiser.init(gates)), thresholds))
    static = {"methods": tuple(methods.items()), "optimiser": optimiser, "mesh": mesh_of(model)}
    trained, _ = train_resumably(
        lambda state, batch, step: _take_step(state, thresholds, model, batch, **static),
        *(state, partial(batches_from, batches, epochs), total, folder),
        lambda step, loss: report(step, jnp.array(jnp.nan) if loss is None else loss),
        checkpoint_steps=checkpoint_steps,
    )
    return {of: {name: trained[of][name] for name in gates[of]} for of in methods}


@lru_cache
def adam_with_cosine(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Adam whose learning rate decays to 0 along a cosine; the same object for the same settings, as jit wants it."""
    return optax.adam(optax.cosine_decay_schedule(learning_rate, steps))


@partial(jax.jit, static_argnames=("methods", "optimiser", "mesh"))
def _take_step(
    state: Any,
    thresholds: Mapping[str, Mapping[str, jax.Array]],
    model: HasFFNs,
    batch: Any,
    *,
    methods: tuple[tuple[str, TrainedMethod], ...],
    optimiser: optax.GradientTransformation,
    mesh: Mesh | None,
) -> tuple[Any, jax.Array]:
    gates, memory = state
    weights = model.ffn_weights()

    def selectors(of: str) -> dict[str, Thresholded]:
        return {name: Thresholded(gates[of][name], threshold) for name, threshold in thresholds[of].items()}

    dense = {} if thresholds else model.traces(batch, {})
    traces = {of: model.traces(batch, selectors(of)) if thresholds else dense for of, _ in methods}

    def loss_of(gates: Mapping[str, Gates]) -> tuple[jax.Array, jax.Array]:
        of_name = dict(methods)
        losses = jnp.stack(
            [
                of_name[of].loss(gate, weights[name], traces[of][name])
                for of, of_method in gates.items()
                for name, gate in of_method.items()
            ]
        )
        return losses.sum(), losses.mean()

    (_, loss), gradients = jax.value_and_grad(loss_of, has_aux=True)(gates)
    updates, memory = optimiser.update(gradients, memory)
    stepped = (optax.apply_updates(gates, updates), memory), loss
    return on_every_device(stepped, mesh)


def batches_from(batches: BatchSource, epochs: int, start: int) -> Iterator[Any]:
    """The batches of several passes from step `start` on."""
    for epoch in range(start // len(batches), epochs):
        yield from batches.batches(epoch, start % len(batches) if epoch == start // len(batches) else 0)
