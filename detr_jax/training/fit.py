"""Fitting a method to a frozen detector: neuron permutation, gates or statistics, and budgets on held-out images."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeGuard, cast

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from detr_jax.calibration.accumulate import accumulate
from detr_jax.calibration.activations import measure_activations, profile_activations
from detr_jax.calibration.allocation import greedy
from detr_jax.calibration.inputs import draw_inputs
from detr_jax.calibration.moments import measure_moments
from detr_jax.calibration.permutation import coactivation_permutation, kmeans_permutation
from detr_jax.calibration.sensitivity import OutputDivergence, layer_sensitivity
from detr_jax.calibration.thresholds import calibrate, recall_threshold, selectors_at_densities
from detr_jax.calibration.token_sensitivity import draw_sensitivities, sensitivity_of
from detr_jax.data.batches import CachedBatches, ImageBatches
from detr_jax.data.dataset import Dataset, Subset
from detr_jax.data.features import BackboneFeatures, backbone_features
from detr_jax.errors import InputError, require_choices, require_counts
from detr_jax.mesh import mesh_of, replicate
from detr_jax.methods import FitMaterial, Method, Score, Thresholded, TrainedMethod, log_odds
from detr_jax.methods.tiles import TileCounts, count_kept
from detr_jax.models import Detector, HasFFNs, Selector, Selectors
from detr_jax.models.parameters import fingerprint
from detr_jax.plan import Plan
from detr_jax.run_folder import PARTS, resumable_parts, versions
from detr_jax.safetensors_io import Arrays
from detr_jax.training.budgets import (
    Budget,
    Density,
    GateTuning,
    MaxDivergence,
    Progress,
    Recall,
    Threshold,
    meet,
    tune_gates,
)
from detr_jax.training.gates import train_gates

OUTPUTS = ("checkpoints", "tuned", PARTS, "activations.safetensors", "plan.safetensors")
GRID = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03, 0.02, 0.01)
"""Densities that an allocation among FFNs chooses from."""
_HALVINGS = 10
_FITS = 5
"""Of a method that shares a density itself, each of which takes minutes."""


@dataclass(frozen=True)
class FitOptions:
    """Options that methods have in common."""

    neuron_order: Literal["coactivation", "own", "kmeans"] = "coactivation"
    """Order of the hidden neurons, which decides what a group is: those together that are active for the same tokens
    of training images, the detector's own, or those together that have similar input weights."""
    statistics_images: int = 256
    """Training images for the order by co-activation and for the statistics of methods in closed form."""
    batch_size: int = 8
    """Images per step and per batch of statistics, over all devices."""
    checkpoint_steps: int = 200
    """Steps between checkpoints."""
    allocation_images: int = 64
    """Held-out images on which a density is shared among the FFNs by methods whose gates are not trained to it."""
    tuning: GateTuning = field(default_factory=GateTuning)
    """Training of gates to a density or a divergence."""

    def __post_init__(self) -> None:
        require_counts(self, "statistics_images", "batch_size", "checkpoint_steps", "allocation_images")
        require_choices(self, "neuron_order")


def hold_out(data: Dataset, calibration: Dataset | int) -> tuple[Dataset, Dataset]:
    """Disjoint images to fit on and to meet budgets on: other images, or how many from the end of `data`."""
    if not isinstance(calibration, int):
        return data, calibration
    if calibration < 1:
        raise InputError(f"at least one image must be held out for calibration, not {calibration}")
    if calibration >= len(data):
        raise InputError(f"{data.name} has {len(data)} images, too few to hold out {calibration} for calibration")
    split = len(data) - calibration
    return Subset(data, 0, split), Subset(data, split, len(data))


class Fit:
    """A method fitted to a detector, which can be given several budgets.

    An interrupted fit in the same folder is resumed from its statistics, checkpoints and finished parts.

    Args:
        detector: frozen, its neurons in their own order.
        data: images to fit on; annotations are not needed.
        held_out: images to meet budgets on.
        method: with its options.
        folder: for statistics and checkpoints.
        progress: show bars.

    Attributes:
        permuted: the detector with the neurons in the order of the plan.
        permutations: (F,) by FFN; empty for the detector's own order.
        images_per_second: of gate training, after the first steps, which compile; None where nothing was trained.
    """

    def __init__(
        self,
        detector: Detector,
        data: Dataset,
        held_out: Dataset,
        method: Method,
        options: FitOptions,
        folder: Path,
        *,
        progress: bool = True,
    ):
        self._detector, self._data, self._held_out = replicate(detector), data, held_out
        self.method, self._options, self._folder, self._progress = method, options, folder, progress
        self._fingerprint = fingerprint(detector)
        self.images_per_second: float | None = None
        self.permutations = self._permutations()
        self.permuted = self._detector.with_permutations(self.permutations)
        self._weights = self.permuted.ffn_weights()
        self._material = self._fit_material()

    @property
    def group_size(self) -> int:
        """Hidden neurons per group."""
        return getattr(self.method, "group_size", 8)

    def plan(self, budget: Budget | None = None) -> Plan:
        """The plan that meets a budget, see `detr_jax.sparsify`; an InputError if the method cannot meet it."""
        budget = check_budget(self.method, budget)
        selectors = self._selectors(budget)
        counts = accumulate(_kept, self.permuted, self._calibration, "measure densities", dict(selectors))
        density = {name: counts[name].density for name in selectors}
        calibration: dict[str, Any] = {"data": self._held_out.name}
        if isinstance(budget, Recall):
            calibration["recall"] = budget.share
        elif budget is not None:
            calibration["budget"] = budget.title
        options = dataclasses.asdict(self._options)
        training = {
            "recipe": dataclasses.asdict(self.method) | {"batch_size": options["batch_size"]},
            "data": self._data.name,
            "order": options["neuron_order"],
            "calibration": calibration,
        }
        if isinstance(budget, Density | MaxDivergence) and in_log_odds(self.method):
            training["tuning"] = options["tuning"]
        measured = {"calibration": {"images": len(self._held_out), "density": density}}
        return Plan(
            *(self.method.name, self._fingerprint, dict(selectors), self.permutations, training, measured, versions())
        )

    def check_frozen(self) -> None:
        """Raises an AssertionError if the detector is another one than at the beginning."""
        if fingerprint(self._detector) != self._fingerprint:
            raise AssertionError("the frozen detector changed")

    def _permutations(self) -> dict[str, np.ndarray]:
        size, order = self.group_size, self._options.neuron_order
        if order == "own":
            return {}
        if order == "kmeans":
            ffns = tqdm(self._detector.ffns.items(), "clustering neurons", unit="FFN", disable=not self._progress)
            return {name: kmeans_permutation(np.asarray(ffn.parameters().w_in), size) for name, ffn in ffns}
        sample, path = self._sample, self._folder / "activations.safetensors"
        with self._bar(len(sample), "counting co-activation", "image") as bar:
            profile = profile_activations(self._detector, sample, self._options.batch_size, path, bar.update)
        return {
            name: coactivation_permutation(np.asarray(of.coactive), size) for name, of in profile.statistics.items()
        }

    def _fit_material(self) -> dict[str, FitMaterial]:
        """What `method.requires` names, for each FFN."""
        requires = self.method.requires
        found: dict[str, Mapping[str, Any]] = {}
        if isinstance(self.method, TrainedMethod):
            found["gate"] = self._train(self.method)
        if "inputs" in requires:
            found["inputs"] = self._drawn("inputs", draw_inputs)
        if "sensitivity" in requires:
            of_all = self._drawn("sensitivities", draw_sensitivities)
            found["sensitivity"] = {name: sensitivity_of(name, of_all) for name in self._weights}
        if requires & {"activations", "input_moments", "hidden_moments"}:
            batches = self._cached(self._embedded(self._sample, "training"))
            if "activations" in requires:
                found["activations"] = measure_activations(self.permuted, batches)
            if requires & {"input_moments", "hidden_moments"}:
                found["input_moments"], found["hidden_moments"] = measure_moments(self.permuted, batches)
        return {
            name: FitMaterial(weights, name=name, **{key: found[key][name] for key in requires})
            for name, weights in self._weights.items()
        }

    def _drawn(self, what: str, draw: Callable[..., Arrays]) -> Arrays:
        method: Any = self.method  # it says how many

        def compute() -> Arrays:
            sample = Subset(self._data, 0, min(method.images, len(self._data)))
            source = ImageBatches(self.permuted, sample, self._options.batch_size)  # features of all fill the memory
            batches = tqdm(source.batches(), f"drawing {what}", len(source), unit="batch", disable=not self._progress)
            return draw(self.permuted, batches, method.tokens, len(sample), method.seed)

        return resumable_parts(self._folder / PARTS)(what, compute)

    def _train(self, method: TrainedMethod) -> dict[str, Score]:
        batch_size = self._options.batch_size
        batches = ImageBatches(self.permuted, self._data, batch_size, method.seed)
        times: list[float] = []
        with self._bar(method.epochs * len(batches), "training gates", "step") as bar:

            def report(step: int, loss: jax.Array) -> None:
                bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)  # waits for the step, so the times are its
                bar.update(step - bar.n)
                times.append(time.perf_counter())

            gates = train_gates(
                *(self.permuted, batches, {method.name: method}, self._folder / "checkpoints", report),
                checkpoint_steps=self._options.checkpoint_steps,
            )[method.name]
        # The median leaves out the steps that compiled a new shape.
        if len(times) > 2:
            self.images_per_second = float(batch_size / np.median(np.diff(times)))
        return gates

    @cached_property
    def _sample(self) -> Dataset:
        return Subset(self._data, 0, min(self._options.statistics_images, len(self._data)))

    @cached_property
    def _scores(self) -> dict[str, Score]:
        scores = {name: self.method.fit(material) for name, material in self._material.items()}
        for score in scores.values():
            if (unit := getattr(score, "unit", None)) != self.method.unit:
                raise TypeError(f"the unit of the scores of {self.method.name} is {unit}, not {self.method.unit}")
        return scores

    @cached_property
    def _features(self) -> list[BackboneFeatures]:
        return self._embedded(self._held_out, "calibration")

    @cached_property
    def _calibration(self) -> CachedBatches:
        return self._cached(self._features)

    def _embedded(self, data: Dataset, use: str) -> list[BackboneFeatures]:
        title = f"embedding {use} images" if self._progress else None
        return list(backbone_features(self.permuted, data, self._options.batch_size, title))

    def _cached(self, features: list[BackboneFeatures]) -> CachedBatches:
        return CachedBatches([batch.tokens for batch in features], mesh=mesh_of(self.permuted))

    def _bar(self, total: int, title: str, unit: str) -> tqdm:
        return tqdm(total=total, desc=title, unit=unit, disable=not self._progress)

    def _selectors(self, budget: Budget | None) -> Selectors:
        method = self.method
        if budget is None:  # `fit` returns selectors
            return cast(Selectors, self._scores)
        if isinstance(budget, Density | MaxDivergence):
            return self._tuned(budget, method.seed) if in_log_odds(method) else self._allocated(budget)
        if isinstance(budget, Recall):
            threshold_of = partial(recall_threshold, recall=budget.share)
            found = calibrate(self.permuted, self._calibration, self._scores, threshold_of)
        else:
            threshold = jnp.float32(log_odds(budget.value) if in_log_odds(method) else budget.value)
            found = {name: Thresholded(score, threshold) for name, score in self._scores.items()}
        return {name: method.finish(selector, self._weights[name]) for name, selector in found.items()}

    def _tuned(self, budget: Density | MaxDivergence, seed: int) -> Selectors:
        """Gates that are trained to a budget from the uniform threshold on, all of them in effect."""
        tuning = self._options.tuning
        batches = ImageBatches(self.permuted, self._data, self._options.batch_size, seed)
        uniform = {name: Thresholded(gate, jnp.float32(0)) for name, gate in self._scores.items()}
        start = meet(self.permuted, self._calibration, uniform, budget)
        with self._bar(tuning.epochs * len(batches), "training to a budget", "step") as bar:

            def report(step: int, progress: Progress | None) -> None:
                if progress is not None:
                    density = np.mean([float(of_one) for of_one in progress.densities.values()])
                    bar.set_postfix(loss=f"{float(progress.loss):.4f}", density=f"{density:.3f}", refresh=False)
                bar.update(step - bar.n)

            folder = self._folder / "tuned" / budget.title.replace(" ", "-")
            tuned = tune_gates(self.permuted, batches, start, budget, tuning, folder, report)
        return meet(self.permuted, self._calibration, tuned, budget)

    def _allocated(self, budget: Density | MaxDivergence) -> Selectors:
        """Densities that are shared among the FFNs by what they change in the outputs."""
        batches = -(-self._options.allocation_images // self._options.batch_size)
        divergence = OutputDivergence(self.permuted, self._features[:batches])
        shared = self._by_method(divergence) if self.method.shares_density else self._by_sensitivity(divergence)
        if isinstance(budget, Density):
            return shared(budget.density)
        low, high = GRID[-1], 1.0
        for _ in range(_FITS if self.method.shares_density else _HALVINGS):
            middle = (low + high) / 2 if not self.method.shares_density else math.sqrt(low * high)
            low, high = (low, middle) if divergence(shared(middle)) <= budget.divergence else (middle, high)
        return shared(high)

    def _by_sensitivity(self, divergence: OutputDivergence) -> Callable[[float], dict[str, Selector]]:
        settings = selectors_at_densities(self.permuted, self._calibration, self.method, self._material, GRID)
        table = layer_sensitivity(divergence, GRID, settings)
        return lambda density: table.selectors(greedy(table.losses, table.density_costs, density))

    def _by_method(self, divergence: OutputDivergence) -> Callable[[float], dict[str, Selector]]:
        method, material = self.method, self._material

        @cache
        def shared(density: float) -> dict[str, Selector]:
            with self._bar(method.parts(len(material)), f"fitting to a density of {density:.3g}", "part") as bar:
                part = resumable_parts(self._folder / PARTS, bar.update)
                return method.at_mean_density(material, density, divergence, part)

        return shared


def in_log_odds(method: Method) -> TypeGuard[TrainedMethod]:
    """Whether the scores of a method are those of gates in log-odds: its threshold is a probability."""
    return isinstance(method, TrainedMethod) and method.unit == "log-odds"


def check_budget(method: Method, budget: Budget | None) -> Budget | None:
    """The budget of a method, its default for None.

    Raises:
        InputError: if the method cannot meet such a budget.
    """
    if method.tuned_by == "nothing":
        if budget is not None:
            fields = ", ".join(field.name for field in dataclasses.fields(method)) or "none"
            raise InputError(f"{method.name} takes no budget; its density follows from its options: {fields}")
        return None
    if budget is None and method.tuned_by == "threshold" and method.decides in ("group", "neuron"):
        return Recall()
    if not isinstance(budget, Recall | Density | MaxDivergence | Threshold):
        raise InputError(
            f"{method.name} needs a budget: Density(0.1), MaxDivergence(0.01)"
            + (", Recall(0.99) or Threshold(0.5)" if method.tuned_by == "threshold" else "")
            + f"; got {budget!r}"
        )
    if method.tuned_by == "density" and not isinstance(budget, Density | MaxDivergence):
        raise InputError(f"{method.name} has no threshold: its budget is a Density or a MaxDivergence, not {budget}")
    if isinstance(budget, Recall) and method.decides == "channel":
        raise InputError(f"{method.name} decides about input channels, which have no recall; take Density or Threshold")
    if isinstance(budget, Threshold) and in_log_odds(method) and not 0 <= budget.value <= 1:
        raise InputError(f"a threshold of {method.name} is a probability from 0 to 1, not {budget.value:g}")
    return budget


@jax.jit
def _kept(model: HasFFNs, batch: Any, selectors: Selectors) -> dict[str, TileCounts]:
    traces = model.traces(batch, selectors)
    return {name: count_kept(traces[name]) for name in selectors}
