"""Budgets of sparsity, and training gates to one: all gates in effect, a Lagrange multiplier per constraint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from detr_jax.calibration.thresholds import density_threshold, measure_scores
from detr_jax.data.batches import BatchSource
from detr_jax.errors import InputError, require_choices, require_counts
from detr_jax.mesh import mesh_of, on_every_device, replicate_like, to_host
from detr_jax.methods import MGS, MGSContribution, Thresholded
from detr_jax.methods.tiles import TileCounts, count_kept
from detr_jax.models import Detector, FFNTrace
from detr_jax.training.checkpoints import train_resumably
from detr_jax.training.gates import adam_with_cosine, batches_from
from detr_jax.training.straight_through import StraightThrough, mean_density

_PROPORTIONAL = 10
"""Steps of ascent that the excess of one batch weighs at once, which damps the multipliers' swings about a solution."""
_LEAST_UNIT = 1e-6
"""Of the objective, where gates begin without a loss."""
_WIDEST_SHIFT = 16.0
_HALVINGS = 14
"""Of an interval of 32 in log-odds: to 0.002."""


@dataclass(frozen=True)
class Recall:
    """In each FFN, the highest threshold at which a share of the active groups, from 0 to 1, is kept."""

    share: float = 0.99

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"a recall must be between 0 and 1, not {self.share}")

    @property
    def title(self) -> str:
        return f"recall {self.share:g}"


@dataclass(frozen=True)
class Threshold:
    """One threshold for all FFNs: of gates a probability, of other methods in the units of their score."""

    value: float = 0.5

    @property
    def title(self) -> str:
        return f"threshold {self.value:g}"


@dataclass(frozen=True)
class DensityPerFFN:
    """Least loss with a density for each FFN by name, a multiplier for each."""

    densities: Mapping[str, float]

    def __post_init__(self) -> None:
        for density in self.densities.values():
            _check_density(density)

    def __hash__(self) -> int:
        return hash(tuple(self.densities.items()))


@dataclass(frozen=True)
class Density:
    """Least loss with a mean density over the FFNs, which training shares among them."""

    density: float

    def __post_init__(self) -> None:
        _check_density(self.density)

    @property
    def title(self) -> str:
        return f"density {self.density:g}"


@dataclass(frozen=True)
class MaxDivergence:
    """Least mean density with a bound on the divergence of the detector's outputs, the mean over images: the dual."""

    divergence: float

    def __post_init__(self) -> None:
        if not self.divergence > 0:
            raise InputError(f"a bound on the divergence of the outputs must be above 0, not {self.divergence}")

    @property
    def title(self) -> str:
        return f"divergence {self.divergence:g}"


TrainedBudget = DensityPerFFN | Density | MaxDivergence
"""Budgets that gates can be trained to."""
Budget = Density | MaxDivergence | Recall | Threshold
"""Budgets that `detr_jax.sparsify` takes."""


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise InputError(f"a density must be above 0 and at most 1, not {density}")


@dataclass(frozen=True)
class GateTuning:
    """How gates are trained to a budget."""

    loss: Literal["divergence", "mgs", "mgs-contribution"] = "divergence"
    """The divergence of the detector's outputs, end to end through the frozen detector; or the labels of a method, on
    the inputs that the other gates leave."""
    epochs: int = 2
    """Passes over the training images."""
    sampled: bool = True
    """Decisions are drawn by their probabilities while training; --tuning.no-sampled decides by the threshold."""
    seed: int = 0
    """Of the draws."""
    learning_rate: float = 3e-3
    """Peak learning rate of Adam, which decays to 0 along a cosine."""
    multiplier_rate: float = 0.02
    """Ascent of a multiplier per step and relative excess, in units of the objective at the start."""
    checkpoint_steps: int = 200
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        require_counts(self, "epochs", "checkpoint_steps")
        require_choices(self, "loss")


class Progress(NamedTuple):
    """Loss () and density () of each FFN in a step's batch, and the multipliers (constraints,) after it."""

    loss: jax.Array
    densities: dict[str, jax.Array]
    multipliers: jax.Array


def tune_gates(
    model: Detector,
    batches: BatchSource,
    selectors: Mapping[str, Thresholded],
    budget: TrainedBudget,
    tuning: GateTuning,
    folder: Path,
    report: Callable[[int, Progress | None], None],
) -> dict[str, Thresholded]:
    """Trains scores and thresholds of all FFNs together, or resumes from the latest checkpoint in `folder`.

    The Lagrangian is objective / unit + sum_i m_i (value_i / bound_i - 1), the unit being the objective before the
    first step. Gates descend, the multipliers m_i >= 0 ascend from 0. Gates are hard in the forward pass and
    probabilities in the backward pass. The frozen weights are an argument of the compiled step that no gradient is
    taken of.

    Args:
        model: the detector, frozen.
        batches: training data, batches of features, as `Detector.embed` returns them.
        selectors: of each FFN by name, to start from: trained, with scores in log-odds, and finite thresholds.
        budget: what is made small within which bounds.
        tuning: the recipe.
        folder: for checkpoints.
        report: called after every step with the number of steps taken so far and what it found; once with None when
            training resumes from a checkpoint.

    Returns:
        the selectors, trained. `meet` sets their thresholds on held-out images.

    Raises:
        InputError: if the bound is one on the divergence of the outputs and the loss something else.
    """
    if isinstance(budget, MaxDivergence) and tuning.loss != "divergence":
        raise InputError(f"a bound on the divergence of the outputs needs that as the loss, not {tuning.loss!r}")
    bounds = jnp.array(
        list(budget.densities.values())
        if isinstance(budget, DensityPerFFN)
        else [budget.density if isinstance(budget, Density) else budget.divergence]
    )
    total = tuning.epochs * len(batches)
    optimiser = adam_with_cosine(tuning.learning_rate, total)
    selectors = dict(selectors)
    state = replicate_like(model, (selectors, optimiser.init(selectors), jnp.zeros(len(bounds)), jnp.float32(0)))
    static = {"budget": budget, "tuning": tuning, "optimiser": optimiser, "mesh": mesh_of(model)}
    trained, *_ = train_resumably(
        lambda state, batch, step: _take_step(state, model, batch, step, bounds, **static),
        *(state, partial(batches_from, batches, tuning.epochs), total, folder, report),
        checkpoint_steps=tuning.checkpoint_steps,
    )
    return {name: trained[name] for name in selectors}


@partial(jax.jit, static_argnames=("budget", "tuning", "optimiser", "mesh"))
def _take_step(
    state: Any,
    model: Detector,
    batch: Any,
    step: jax.Array,
    bounds: jax.Array,
    *,
    budget: TrainedBudget,
    tuning: GateTuning,
    optimiser: optax.GradientTransformation,
    mesh: Mesh | None,
) -> tuple[Any, Progress]:
    selectors, memory, multipliers, unit = state

    def value(selectors: Mapping[str, Thresholded]) -> tuple[jax.Array, tuple[Any, ...]]:
        loss, densities = _loss_and_densities(tuning, model, batch, selectors, step)
        objective, bounded = _objective(budget, loss, densities)
        excess = bounded / bounds - 1
        # A batch of padding alone says nothing about either.
        seen = jnp.where(batch.valid.any(), jnp.clip(jax.lax.stop_gradient(excess), -1, 1), 0)
        first = (unit == 0) & batch.valid.any()
        scale = jnp.where(first, jnp.maximum(jax.lax.stop_gradient(objective), _LEAST_UNIT), unit)
        pressure = jnp.maximum(multipliers + _PROPORTIONAL * tuning.multiplier_rate * seen, 0)
        lagrangian = objective / jnp.where(scale > 0, scale, 1) + (pressure * excess).sum()
        return lagrangian, (seen, scale, loss, densities)

    gradients, (seen, unit, loss, densities) = jax.grad(value, has_aux=True)(selectors)
    updates, memory = optimiser.update(gradients, memory)
    multipliers = jnp.maximum(multipliers + tuning.multiplier_rate * seen, 0)
    state = (optax.apply_updates(selectors, updates), memory, multipliers, unit)
    stepped = state, Progress(loss, densities, multipliers)
    return on_every_device(stepped, mesh)


def _objective(
    budget: TrainedBudget, loss: jax.Array, densities: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The objective (), and the bounded values (n,), from the gates' loss () and the density () of each FFN."""
    if isinstance(budget, DensityPerFFN):
        return loss, jnp.stack([densities[name] for name in budget.densities])
    mean = jnp.stack(list(densities.values())).mean()
    return (loss, mean[None]) if isinstance(budget, Density) else (mean, loss[None])


def _loss_and_densities(
    tuning: GateTuning, model: Detector, batch: Any, selectors: Mapping[str, Thresholded], step: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss () of gates that are in effect, and the density () of each FFN."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(tuning.seed), step), len(selectors))
    running = {
        name: StraightThrough(selector, key if tuning.sampled else None)
        for (name, selector), key in zip(selectors.items(), keys, strict=True)
    }
    outputs = model.transform(batch, selectors=running, trace=True)
    weights = model.ffn_weights()
    # Of its inputs, a gate takes what the others leave: they are not trained to make its decisions easier.
    traces: dict[str, FFNTrace] = jax.lax.stop_gradient(outputs.traces or {})
    densities = {
        name: mean_density(one.logits(weights[name], traces[name].inputs, traces[name].tokens), traces[name].tokens)
        for name, one in running.items()
    }
    if tuning.loss == "divergence":
        changes = model.divergence(model.transform(batch), outputs)
        loss = jnp.where(batch.valid, changes, 0).sum() / jnp.maximum(batch.valid.sum(), 1)
    else:
        label_loss = {"mgs": MGS, "mgs-contribution": MGSContribution}[tuning.loss]().loss
        losses = [label_loss(s.logits, weights[name], traces[name]) for name, s in running.items()]
        loss = jnp.stack(losses).mean()
    return loss, densities


def measure(
    model: Detector, batches: BatchSource, selectors: Mapping[str, Thresholded], tile_size: int = 1
) -> tuple[float, dict[str, float]]:
    """The mean divergence of the outputs over the images of one pass, and the density of each FFN by name, of tiles.

    Selectors are in effect; batches are of features, as `Detector.embed` returns them.
    """
    count = partial(_measure, tile_size=tile_size)
    selectors = replicate_like(model, dict(selectors))
    measured = [to_host(count(model, batch, selectors)) for batch in batches.batches()]
    changes, valid, tiles = zip(*measured, strict=True)
    densities = {name: sum((t[name] for t in tiles[1:]), tiles[0][name]).density for name in selectors}
    return float(np.sum(changes) / np.sum(valid)), densities


@partial(jax.jit, static_argnames="tile_size")
def _measure(
    model: Detector, batch: Any, selectors: Mapping[str, Thresholded], *, tile_size: int
) -> tuple[jax.Array, jax.Array, dict[str, TileCounts]]:
    running = {name: StraightThrough(selector, tile_size=tile_size) for name, selector in selectors.items()}
    outputs = model.transform(batch, selectors=running, trace=True)
    changes = model.divergence(model.transform(batch), outputs)
    counts = {name: count_kept(trace, tile_size) for name, trace in (outputs.traces or {}).items() if name in selectors}
    return jnp.where(batch.valid, changes, 0).sum(), batch.valid.sum(), counts


def meet(
    model: Detector,
    held_out: BatchSource,
    selectors: Mapping[str, Thresholded],
    budget: TrainedBudget,
    tile_size: int = 1,
) -> dict[str, Thresholded]:
    """The selectors with thresholds that meet a budget exactly on images that nothing was trained on.

    Densities of each FFN are calibrated in the order in which the FFNs run, with the others on. A mean density or a
    bound on the divergence takes one number that all thresholds are shifted by, so that the densities keep their
    ratios.

    Args:
        model: the detector.
        held_out: batches of features, as `Detector.embed` returns them.
        selectors: in the order in which the FFNs run; all in effect.
        budget: what they were trained to.
        tile_size: consecutive tokens that are computed together.
    """
    chosen = dict(selectors)
    if isinstance(budget, DensityPerFFN):
        for name, density in budget.densities.items():
            scores = {n: selector.score for n, selector in chosen.items()}  # one program measures each of them
            running = {n: StraightThrough(selector, tile_size=tile_size) for n, selector in chosen.items()}
            histogram = measure_scores(model, held_out, scores, running, tile_size=tile_size)[name]
            chosen[name] = chosen[name].at(density_threshold(histogram, density))
        return chosen

    def shifted(shift: float) -> dict[str, Thresholded]:
        return {name: selector.at(selector.threshold + shift) for name, selector in chosen.items()}

    def too_low(shift: float) -> bool:
        change, densities = measure(model, held_out, shifted(shift), tile_size)
        if isinstance(budget, MaxDivergence):
            return change <= budget.divergence
        return bool(np.mean(list(densities.values())) > budget.density)

    low, high = -_WIDEST_SHIFT, _WIDEST_SHIFT
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if too_low(middle) else (low, middle)
    return shifted(low if isinstance(budget, MaxDivergence) else high)
