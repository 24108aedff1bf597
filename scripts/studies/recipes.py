"""From the paper's recipe to the fastest plan: what each ingredient does for accuracy, tile density and FFN time."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import tyro
from common import Rows, Scorer, Splits, cached, check_options, embed, frozen, open_splits, train
from recipe_report import LOST, best_table, plot_recipes, points_table
from tqdm import tqdm

import detr_jax
from detr_jax.calibration.activations import measure_activations
from detr_jax.calibration.allocation import greedy
from detr_jax.calibration.permutation import coactivation_permutation
from detr_jax.calibration.sensitivity import OutputDivergence, SensitivityTable, layer_sensitivity
from detr_jax.calibration.thresholds import density_threshold, measure_scores
from detr_jax.commands import cli
from detr_jax.commands.options import DataOptions
from detr_jax.data.dataset import Subset
from detr_jax.files import replacing
from detr_jax.kernels import Execution
from detr_jax.methods import MGS, Executed, MGSContribution, Thresholded, TrainedMethod, log_odds
from detr_jax.methods.grouping import group_count
from detr_jax.models import DETR, Selector
from detr_jax.run_folder import finish_run, open_run
from detr_jax.search.candidates import CANDIDATE_KINDS
from detr_jax.search.search import PlanSearch, SearchSettings
from detr_jax.training.budgets import Density, DensityPerFFN, GateTuning, Progress, measure, meet, tune_gates
from detr_jax.training.gates import Gates, GateTraining
from detr_jax.training.straight_through import StraightThrough
from detr_jax.viz.figures import save_figure

GRID = (1.0, 0.7, 0.5, 0.4, 0.3, 0.25, 0.2, 0.16, 0.12, 0.09, 0.06, 0.04, 0.02)
"""Densities of tiles that gates' allocations choose from, in each FFN."""
OUTPUTS = ("gates-own", "gates", "tuned", "progress.json", "recipes.md", "recipes.png")


@dataclass(frozen=True)
class Arguments:
    """Goes from the paper's recipe to the fastest plan, one ingredient after the other, and measures each at several
    densities: points of AP, density of pairs of token tile and neuron block, and time of all FFNs on this device.

    Everything is measured as it runs: what one token of a tile needs, the whole tile gets. Without options: detr-tiny
    on 500 generated scenes. Writes results.json, recipes.md and recipes.png into the output folder.
    """

    model: str = "detr-tiny"
    """Name of a detector or path of a checkpoint."""
    preset: str | None = None
    """Architecture of a checkpoint that does not say which it is, e.g. detr-r50."""
    data: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=DataOptions)
    train_images: int = 4096
    """Images to train gates on; what the transformer gets of them is kept in memory."""
    eval_images: int = 500
    """Validation images."""
    allocation_images: int = 40
    """Of the calibration images, those on which gates' densities are shared among the FFNs."""
    tile_size: int = 64
    """Consecutive tokens that are computed together; an image of fewer is one tile."""
    thresholds: tuple[float, ...] = (0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1)
    """Of the paper's recipe; its own is 0.5."""
    densities: tuple[float, ...] = (0.5, 0.4, 0.3, 0.24, 0.19, 0.15, 0.12, 0.09)
    """Mean densities of tiles that gates are calibrated to."""
    tuned_densities: tuple[float, ...] = (0.19, 0.12)
    """Mean densities of tiles that gates are trained to."""
    shares: tuple[float, ...] = (0.5, 0.4, 0.33, 0.27, 0.22, 0.18, 0.14, 0.1)
    """Of the dense FFNs' density, and of their time, that plans are searched for."""
    training: Annotated[GateTraining, tyro.conf.OmitArgPrefixes] = field(
        default_factory=lambda: GateTraining(batch_size=16)
    )
    tuning: GateTuning = field(default_factory=GateTuning)
    search: SearchSettings = field(default_factory=SearchSettings)
    """Candidates of the search."""
    out: Path = Path("runs/recipes")
    """Folder for the results."""
    resume: bool = False
    """Resume an interrupted run in the output folder."""
    overwrite: bool = False
    """Delete an earlier run in the output folder."""


Timed = Mapping[str, tuple[Selector, np.ndarray]]
"""By FFN its selector, and the order of the detector's neurons that it belongs to."""


class Study:
    """The detector in both orders of its neurons, data, and the points measured so far."""

    def __init__(self, arguments: Arguments, own: DETR, splits: Splits):
        self.own, self._arguments = own, arguments
        settings, size = arguments.search, arguments.training.group_size
        self._training = cached(
            embed(own, splits.training, arguments.training.batch_size, "training"), arguments.training.seed
        )
        self._calibration = embed(own, splits.calibration, settings.batch_size, "calibration")
        self._held_out = cached(self._calibration)
        validation = embed(own, splits.validation, settings.batch_size, "validation")

        tokens = max(sum(rows * columns for rows, columns in batch.grids) for batch in self._calibration)
        window = arguments.tile_size if tokens > arguments.tile_size else None
        sample = Subset(splits.training, 0, min(settings.statistics_images, len(splits.training)))
        self.search = PlanSearch(own, sample, splits.calibration, settings)
        statistics = measure_activations(own, cached(embed(own, sample, settings.batch_size, "statistics")))
        self._permutations = {name: coactivation_permutation(of.coactive, size) for name, of in statistics.items()}
        self.model = own.with_permutations(self._permutations)
        self._execution = Execution(window, size)

        self._rows = Rows(arguments.out / "progress.json")
        self.timed: dict[str, Timed] = {}
        self.score = Scorer(own, splits.validation, validation, size)

    def point(
        self,
        recipe: str,
        setting: str,
        model: DETR,
        selectors: Mapping[str, Selector],
        timed: Timed,
        chosen_by: str | None = None,
    ) -> None:
        """Measures selectors unless an interrupted run has; what was chosen by times that differ is measured again."""
        key = f"{recipe}: {setting}"
        self.timed[key] = timed
        if key in self._rows and chosen_by is None:
            return
        row = {"recipe": recipe, "setting": setting, "chosen_by": chosen_by} | self.score(model, selectors)
        self._rows.keep(key, row)
        tqdm.write(f"{key:<64} {100 * row['AP_minus_dense']:+6.2f} points, density {row['density']:.3f}")

    def gated(self, recipe: str, setting: str, model: DETR, gates: Mapping[str, Thresholded]) -> None:
        """Measures gates, whose tiles get what one of their tokens needs."""
        tiled = {name: StraightThrough(gate, tile_size=self._arguments.tile_size) for name, gate in gates.items()}
        specs, permutations = model.ffn_specs(), {} if model is self.own else self._permutations
        order = {name: permutations.get(name, np.arange(specs[name].hidden)) for name in gates}
        timed = {name: (Executed(gate, self._execution), order[name]) for name, gate in gates.items()}
        self.point(recipe, setting, model, tiled, timed)

    def searched(self, recipe: str, kinds: Sequence[str]) -> None:
        """Measures what the search chooses among some kinds of candidates, by density and by time."""
        search = self.search
        for unit in ("density", "latency"):
            for choice in search.choices(self._arguments.shares, kinds, unit):
                chosen = search.chosen(choice)
                trials = {name: candidate.trial for name, candidate in chosen.items()}
                timed = {name: (c.selector, c.order) for name, c in chosen.items() if c.selector is not None}
                setting = f"by {unit} {search.cost(choice, unit):.2f}"
                self.point(recipe, setting, self.own, trials, timed, unit)

    def train(self, model: DETR, methods: Sequence[type[TrainedMethod]], folder: str) -> dict[str, Gates]:
        """Gates on labels."""
        chosen = [self._arguments.training.method(method) for method in methods]
        return train(model, self._training, chosen, self._arguments.out / folder)

    def sensitivity(self, model: DETR, gates: Gates) -> SensitivityTable:
        """Gates at every density of tiles in each FFN, the others dense."""
        histograms = measure_scores(model, self._held_out, gates, tile_size=self._tile_size(gates))
        settings = {
            name: [Thresholded(gate, jnp.float32(density_threshold(histograms[name], density))) for density in GRID]
            for name, gate in gates.items()
        }
        images = -(-self._arguments.allocation_images // self._arguments.search.batch_size)
        return layer_sensitivity(OutputDivergence(model, self._calibration[:images]), GRID, settings)

    def _tile_size(self, gates: Gates) -> int:
        """Of the tokens that are computed together without being decided about together."""
        decided = next(iter(gates.values())).traits.tile_size
        return self._arguments.tile_size if decided == 1 else 1

    def calibrated(self, recipe: str, model: DETR, gates: Gates) -> SensitivityTable:
        """Measures gates at every density, shared among the FFNs by the change of the outputs."""
        sensitivity = self.sensitivity(model, gates)
        for density in self._arguments.densities:
            self.gated(recipe, f"density {density:g}", model, self.shared(sensitivity, density))
        return sensitivity

    def shared(self, sensitivity: SensitivityTable, density: float) -> dict[str, Thresholded]:
        """Gates at a mean density of tiles."""
        costs = np.broadcast_to(sensitivity.densities / len(sensitivity.names), sensitivity.losses.shape)
        return sensitivity.selectors(greedy(sensitivity.losses, costs, density))

    def tuned(self, recipe: str, sensitivity: SensitivityTable) -> None:
        """Measures gates that are trained on, all in effect, through the frozen detector."""
        arguments = self._arguments
        for density in arguments.tuned_densities:
            start = self.shared(sensitivity, density)
            tile_size = self._tile_size({name: selector.score for name, selector in start.items()})
            # To the density per token: training with the union of a tile is worse, see docs/negative-results.md.
            _, densities = measure(self.model, self._held_out, start)
            # A gate that keeps nothing has no density to train to; a tile of the sparsest setting has at least this.
            least = GRID[-1] / arguments.tile_size
            densities = {name: max(share, least) for name, share in densities.items()}
            folder = arguments.out / "tuned" / f"{recipe} {density:g}".replace(" ", "-")
            total = arguments.tuning.epochs * len(self._training)
            with tqdm(total=total, desc="training to a budget", unit="step") as bar:

                def report(step: int, progress: Progress | None, bar: tqdm = bar) -> None:
                    if progress is not None:
                        bar.set_postfix(loss=f"{float(progress.loss):.4f}", refresh=False)
                    bar.update(step - bar.n)

                budget = DensityPerFFN(densities)
                trained = tune_gates(self.model, self._training, start, budget, arguments.tuning, folder, report)
            met = meet(self.model, self._held_out, trained, Density(density), tile_size)
            self.gated(recipe, f"density {density:g}", self.model, met)

    def points(self) -> list[dict]:
        """All points with the time of their FFNs as a share of the dense ones', measured beside each other."""
        dense = {name: (None, np.arange(spec.hidden)) for name, spec in self.own.ffn_specs().items()}
        ways = {
            name: [dense[name], *(timed.get(name, dense[name]) for timed in self.timed.values())]
            for name in self.search.names
        }
        seconds = sum(self.search.times(ways, "timing all points").values())
        shares = (seconds[1:] / seconds[0]).tolist()
        return [self._rows.by_key[key] | {"time": share} for key, share in zip(self.timed, shares, strict=True)]


def check(arguments: Arguments, model: DETR) -> None:
    """Refuses what cannot be computed, before the output folder is claimed."""
    check_options(arguments, shares=("thresholds", "densities", "tuned_densities", "shares"), least={"tile_size": 1})
    arguments.search.check()
    for spec in model.ffn_specs().values():
        group_count(spec.hidden, arguments.training.group_size)


def main(arguments: Arguments) -> None:
    started = time.perf_counter()
    own = detr_jax.load(arguments.model, preset=arguments.preset)
    check(arguments, own)
    held_out = arguments.search.calibration_images
    splits = open_splits(arguments.data, own, arguments.train_images, held_out, arguments.eval_images)
    with frozen(own) as fingerprint:
        settings = cli.settings(arguments, detector=fingerprint, **splits.fingerprints)
        open_run(arguments.out, settings, OUTPUTS, resume=arguments.resume, overwrite=arguments.overwrite)
        study = Study(arguments, own, splits)
        mgs = study.train(own, [MGS], "gates-own")["mgs"]
        for threshold in arguments.thresholds:
            gates = {name: Thresholded(gate, jnp.float32(log_odds(threshold))) for name, gate in mgs.items()}
            study.gated("the paper's recipe", f"threshold {threshold:g}", own, gates)
        study.calibrated("+ a threshold for each FFN", own, mgs)
        gates = study.train(study.model, (MGS, MGSContribution), "gates")
        sensitivity = study.calibrated("+ groups by co-activation", study.model, gates["mgs"])
        study.tuned("+ trained through the detector", sensitivity)
        study.calibrated("labels by contribution", study.model, gates["mgs-contribution"])
        study.searched("fixed sets", ("dense", "fixed"))
        study.searched("fixed sets with reconstructed output layers", ("dense", "fixed, reconstructed"))
        study.searched("narrow experts", ("dense", "experts"))
        study.searched("whatever is best", CANDIDATE_KINDS)
        points = study.points()

    results = {
        "model": arguments.model,
        "fingerprint": fingerprint,
        "data": splits.names,
        "images": len(splits.validation),
        "dense_AP": study.score.dense_AP,
        "points": points,
        "seconds": time.perf_counter() - started,
        **cli.provenance(arguments),
    }
    best = best_table(points)
    text = f"Least at a loss of at most {LOST:g} points:\n\n{best}\n\nAll points:\n\n{points_table(points)}\n"
    print(f"\n{text}")
    with replacing(arguments.out / "recipes.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    figure = plot_recipes(f"{arguments.model}, {splits.validation.name}", points)
    save_figure(figure, arguments.out / "recipes.png")
    finish_run(arguments.out, results)
    print(f"results.json, recipes.md and recipes.png are in {arguments.out} after {math.ceil(results['seconds'])} s")


if __name__ == "__main__":
    cli.run(main, Arguments)
