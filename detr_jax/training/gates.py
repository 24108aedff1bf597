"""Training the gates of all FFNs on a frozen detector, from one forward pass (arXiv 2510.09380)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from detr_jax.data.dataset import Dataset
from detr_jax.data.loading import Batch, batches, layout_batches
from detr_jax.model import DETR, FFNTrace
from detr_jax.sparsity.calibration import firing_histogram, recall_thresholds
from detr_jax.sparsity.gates import PAPER_GROUP_SIZE, LinearGate, initial_gates, with_thresholds
from detr_jax.sparsity.grouping import firing_groups
from detr_jax.training.checkpoints import Checkpoints

Gates = dict[str, LinearGate]


@dataclass(frozen=True)
class GateTraining:
    """How gates are trained. Group size, epochs, labels and loss are the paper's; it does not name the optimiser."""

    group_size: int = PAPER_GROUP_SIZE
    """Hidden neurons per gate."""
    epochs: int = 5
    """Passes over the training images."""
    batch_size: int = 8
    """Images per step."""
    learning_rate: float = 3e-3
    """Peak learning rate of Adam, which decays to 0 along a cosine."""
    seed: int = 0
    """Order of the images."""
    checkpoint_steps: int = 200
    """Steps between checkpoints."""

    def __post_init__(self):
        for name in ("group_size", "epochs", "batch_size", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


def gate_loss(gate: LinearGate, trace: FFNTrace, valid: jax.Array) -> jax.Array:
    """Binary cross-entropy between a gate and the groups that fire, averaged over groups and tokens.

    Args:
        gate: of the FFN.
        trace: of the FFN in the dense detector.
        valid: (batch,) bool, false for images that only fill the batch.
    """
    logits = gate.logits(trace.inputs)
    fires = firing_groups(trace.hidden, logits.shape[-1]).astype(logits.dtype)
    tokens = trace.tokens & valid[:, None]
    losses = optax.sigmoid_binary_cross_entropy(logits, fires).mean(-1)
    return jnp.where(tokens, losses, 0).sum() / tokens.sum()


def train_gates(
    model: DETR,
    dataset: Dataset,
    training: GateTraining,
    folder: Path,
    report: Callable[[int, jax.Array], None],
) -> Gates:
    """Trains a gate for every FFN, or goes on from the latest checkpoint in `folder`.

    The detector is an argument of the compiled step that no gradient is taken of and nothing is returned of: it stays
    as it is, bit for bit.

    Args:
        model: the frozen detector.
        dataset: training images.
        training: the recipe.
        folder: for checkpoints.
        report: called after every step with the number of steps taken so far and the mean loss of the gates.

    Returns:
        gates by name of their FFN, with the threshold 0.5.
    """
    total = training_steps(model, dataset, training)
    optimise = optax.adam(optax.cosine_decay_schedule(training.learning_rate, total))

    @jax.jit
    def take_step(state, model, pixel_values, pixel_mask, valid):
        parameters, memory = state
        traces = model(pixel_values, pixel_mask, trace=True).traces

        def loss_of(parameters):
            losses = [gate_loss(_gate(parameters[name]), trace, valid) for name, trace in traces.items()]
            return jnp.stack(losses).mean()

        loss, gradients = jax.value_and_grad(loss_of)(parameters)
        updates, memory = optimise.update(gradients, memory)
        return (optax.apply_updates(parameters, updates), memory), loss

    gates = initial_gates(model.config, training.group_size)
    parameters = {name: {"kernel": gate.kernel, "bias": gate.bias} for name, gate in gates.items()}
    state = (parameters, optimise.init(parameters))
    checkpoints = Checkpoints(folder)
    start, state = checkpoints.restore(state) or (0, state)
    if start:
        report(start, jnp.nan)
    for step, batch in enumerate(_training_batches(model, dataset, training, start), start + 1):
        state, loss = take_step(state, model, batch.pixel_values, batch.pixel_mask, batch.valid)
        report(step, loss)
        if step % training.checkpoint_steps == 0 or step == total:
            checkpoints.save(step, state)
    checkpoints.close()
    return {name: _gate(state[0][name]) for name in model.config.ffn_names}


def training_steps(model: DETR, dataset: Dataset, training: GateTraining) -> int:
    """Number of steps of a whole training."""
    return training.epochs * len(layout_batches(dataset.image_sizes(), model.config, training.batch_size))


def _gate(parameters: dict[str, jax.Array]) -> LinearGate:
    return LinearGate(**parameters, threshold=jnp.float32(0.5))


def _training_batches(model: DETR, dataset: Dataset, training: GateTraining, start: int) -> Iterator[Batch]:
    """The batches from step `start` on: a function of the seed and the step alone."""
    per_epoch = training_steps(model, dataset, training) // training.epochs
    for epoch in range(start // per_epoch, training.epochs):
        first = start % per_epoch if epoch == start // per_epoch else 0
        yield from batches(
            dataset, model.config, training.batch_size, shuffle_seed=training.seed, epoch=epoch, start=first
        )


def calibrate_gates(
    model: DETR, gates: Gates, dataset: Dataset, batch_size: int, recall: float, report: Callable[[int], None]
) -> Gates:
    """The same gates with the highest thresholds at which each finds the given share of the groups that fire.

    Args:
        model: the detector, dense during calibration.
        gates: trained gates.
        dataset: images that the gates were not trained on.
        batch_size: images per batch.
        recall: the share, from 0 to 1.
        report: called with the number of images of every batch.
    """

    @jax.jit
    def histograms(model, gates, pixel_values, pixel_mask, valid):
        traces = model(pixel_values, pixel_mask, trace=True).traces
        return {name: firing_histogram(gates[name], trace, valid) for name, trace in traces.items()}

    def passes():
        for batch in batches(dataset, model.config, batch_size):
            yield histograms(model, gates, batch.pixel_values, batch.pixel_mask, batch.valid)
            report(int(batch.valid.sum()))

    return with_thresholds(gates, recall_thresholds(passes(), recall))
