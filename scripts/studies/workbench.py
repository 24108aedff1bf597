"""The state that the parts of the comparison of selectors share."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from studies.allocation_tables import cost_table
from studies.common import Rows, Splits, cached, describe, embed, train
from tqdm import tqdm

from detr_jax.calibration.activations import ActivationStatistics, profile_activations
from detr_jax.calibration.inputs import draw_inputs
from detr_jax.calibration.moments import measure_moments
from detr_jax.calibration.permutation import coactivation_permutation, kmeans_permutation
from detr_jax.calibration.sensitivity import OutputDivergence, SensitivityTable, layer_sensitivity
from detr_jax.calibration.thresholds import selectors_at_densities
from detr_jax.calibration.token_sensitivity import draw_sensitivities, sensitivity_of
from detr_jax.data.dataset import Dataset, Subset
from detr_jax.evaluation.comparison import Comparison, Row
from detr_jax.methods import METHODS, FitMaterial, Thresholded, TrainedMethod
from detr_jax.models import DETR, Selector, Selectors
from detr_jax.run_folder import PARTS, resumable_parts
from detr_jax.training.gates import Gates

if TYPE_CHECKING:
    from compare_selectors import Arguments

GRID = (1.0, 0.5, 0.3, 0.2, 0.15, 0.1, 0.08, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01)
"""Densities that allocations choose from, in each FFN."""


class Workbench:
    """State of a comparison: the detector in two orders of its neurons, data, and rows so far."""

    def __init__(self, arguments: "Arguments", model: DETR, splits: Splits):
        self.arguments, self.own = arguments, model
        size = arguments.training.group_size
        sample = Subset(splits.training, 0, min(arguments.statistics_images, len(splits.training)))
        statistics = self._statistics(model, sample, "activations.safetensors")
        self.permutations: dict[str, np.ndarray] = {}
        if arguments.neuron_order == "coactivation":
            self.permutations = {name: coactivation_permutation(s.coactive, size) for name, s in statistics.items()}
        if arguments.neuron_order == "kmeans":
            self.permutations = {
                n: kmeans_permutation(np.asarray(f.w_in), size) for n, f in model.ffn_weights().items()
            }
        self.ordered = model.with_permutations(self.permutations)
        self.statistics = self._statistics(self.ordered, sample, "activations-ordered.safetensors")
        self.weights = self.ordered.ffn_weights()

        self.training = embed(model, splits.training, arguments.training.batch_size, "training")
        sampled = -(-len(sample) // arguments.training.batch_size)
        sample_passes = cached(self.training[:sampled])
        self.inputs, self.hidden = measure_moments(self.ordered, sample_passes)
        calibration = embed(model, splits.calibration, arguments.eval_batch_size, "calibration")
        self.validation = embed(model, splits.validation, arguments.eval_batch_size, "validation")
        self.comparison = Comparison(model, splits.validation, self.validation, size)
        images = -(-arguments.allocation_images // arguments.eval_batch_size)
        self.divergence = OutputDivergence(self.ordered, calibration[:images])
        self.held_out = cached(calibration)
        self.rows = Rows(arguments.out / "progress.json")
        self._drawn: dict[str, dict[str, FitMaterial]] = {}
        self._scorer = ThreadPoolExecutor(1)
        self._pending: tuple[str, Future[Row]] | None = None

    def _statistics(self, model: DETR, sample: Dataset, file: str) -> dict[str, ActivationStatistics]:
        arguments = self.arguments
        with tqdm(total=len(sample), desc="activation statistics", unit="image") as bar:
            path, batch_size = arguments.out / file, arguments.training.batch_size
            self.profile = profile_activations(model, sample, batch_size, path, bar.update)
        return {name: self.profile.statistics[name] for name in model.ffn_specs()}

    def train(
        self,
        model: DETR,
        methods: Sequence[TrainedMethod],
        folder: str,
        active_selectors: Mapping[str, Mapping[str, Thresholded]] | None = None,
    ) -> dict[str, Gates]:
        """Gates of some methods on the cached training images."""
        batches = cached(self.training, self.arguments.training.seed)
        return train(model, batches, methods, self.arguments.out / folder, active_selectors)

    def row(
        self,
        section: str,
        selector: str,
        setting: str,
        *,
        model: DETR,
        selectors: Callable[[], Selectors],
        active: Selectors | None = None,
    ) -> None:
        """Measures a row unless an interrupted run has it already; it is scored while the next one is detected.

        `active` are selectors for the forward pass that also has some that keep everything.
        """
        key = f"{section}: {selector}, {setting}"
        if key in self.rows:
            return
        chosen = selectors()
        about = {"section": section, "selector": selector, "setting": setting}
        about |= {"group_size": self.arguments.training.group_size}
        about |= {"order": "own" if model is self.own else self.arguments.neuron_order}
        about |= describe(next(iter(chosen.values()))) if chosen else {}
        measured = self.comparison.detect(model, chosen if active is None else active)
        self.finish_rows()

        def complete() -> Row:
            return about | self.comparison.row(chosen, measured)

        self._pending = key, self._scorer.submit(complete)

    def finish_rows(self) -> None:
        """Waits for the row that is being scored, and keeps it."""
        if self._pending is None:
            return
        key, future = self._pending
        row = future.result()
        self.rows.keep(key, row)
        self._pending = None
        low, high = row["AP_minus_dense_interval"]
        tqdm.write(
            f"{key:<58} AP {row['numbers']['AP']:.3f}, {100 * row['AP_minus_dense']:+6.2f} points "
            f"[{100 * low:+6.2f}, {100 * high:+6.2f}], density {row['density']:.3f}, "
            f"FFN work {row['flops_share']['ffns']:.3f}"
        )

    def at_mean_density(self, name: str, density: float) -> dict[str, Selector]:
        """The selectors of a method that shares a density among the FFNs itself."""
        method: Any = self.arguments.training.method(METHODS[name])
        if name not in self._drawn:
            sample = self.training[: -(-method.images // self.arguments.training.batch_size)]
            count = sum(int(batch.valid.sum()) for batch in sample)
            inputs, sensitivities = (
                draw(self.ordered, cached(sample).batches(), method.tokens, count, method.seed)
                for draw in (draw_inputs, draw_sensitivities)
            )
            self._drawn[name] = {
                ffn: FitMaterial(w, inputs=inputs[ffn], sensitivity=sensitivity_of(ffn, sensitivities), name=ffn)
                for ffn, w in self.weights.items()
            }
        material = self._drawn[name]
        with tqdm(total=method.parts(len(material)), desc=f"{name}, density {density:g}", unit="part") as bar:
            part = resumable_parts(self.arguments.out / PARTS / name, bar.update)
            return method.at_mean_density(material, density, self.divergence, part)

    def sensitivity(self, name: str, gates: Mapping[str, Gates]) -> SensitivityTable:
        """A method at every density of the grid in each FFN."""
        method = self.arguments.training.method(METHODS[name])
        gate = gates[method.gates.name] if isinstance(method, TrainedMethod) else dict.fromkeys(self.weights)
        material = {
            ffn: FitMaterial(weights, self.statistics[ffn], self.inputs[ffn], self.hidden[ffn], gate[ffn], ffn)
            for ffn, weights in self.weights.items()
        }
        settings = selectors_at_densities(self.ordered, self.held_out, method, material, GRID)
        return layer_sensitivity(self.divergence, GRID, settings)

    def costs(self, sensitivity: SensitivityTable) -> np.ndarray:
        """(FFNs, settings) what the settings cost, all of them dense costing 1."""
        if self.arguments.costs is None:
            return sensitivity.density_costs
        return cost_table(self.arguments.costs, sensitivity.names, sensitivity.densities)
