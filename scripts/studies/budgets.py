"""Compares gates that are calibrated to a density with gates that are trained to it."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import tyro
from comparison_report import markdown_table
from tqdm import tqdm

import detr_jax
from detr_jax.calibration.activation_passes import profile_activations
from detr_jax.calibration.allocation import greedy
from detr_jax.calibration.permutation import coactivation_permutation, permute_neurons
from detr_jax.calibration.sensitivity import OutputDivergence, SensitivityTable, layer_sensitivity
from detr_jax.calibration.threshold_passes import measure_scores
from detr_jax.calibration.thresholds import density_threshold
from detr_jax.commands import cli
from detr_jax.data.batches import CachedBatches
from detr_jax.data.dataset import Subset
from detr_jax.data.features import BackboneFeatures, backbone_features
from detr_jax.data.registry import open_dataset
from detr_jax.evaluation.coco_ap import bootstrap, confidence_interval, score
from detr_jax.evaluation.runs import measure_dataset
from detr_jax.files import replacing, write_json
from detr_jax.methods import Thresholded
from detr_jax.models import DETR
from detr_jax.run_folder import RESULTS, open_run
from detr_jax.training.budgets import (
    Budget,
    DensityOfEach,
    GateTuning,
    MaxDivergence,
    MeanDensity,
    Progress,
    StraightThrough,
    measure,
    meet,
    tune_gates,
)
from detr_jax.training.gates import MGS, GateTraining, train_gates

GRID = (1.0, 0.7, 0.5, 0.35, 0.25, 0.2, 0.15, 0.12, 0.1, 0.08, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01)
"""Densities that allocations choose from, in each FFN."""
TILE_SIZES = (1, 16, 64)
"""Of the densities that are reported."""
OUTPUTS = ("gates", "tuned", "activations.safetensors", "study.md")


@dataclass(frozen=True)
class Arguments:
    """Compares MGS gates whose thresholds are calibrated to a density with gates that are trained to it.

    Without options: detr-tiny on 300 generated scenes. All FFNs are gated; every row's thresholds meet its budget
    on held-out training images. Writes results.json and study.md into the output folder.
    """

    model: str = "detr-tiny"
    """Name of a detector or path of a checkpoint."""
    coco: Path | None = None
    """Folder with train2017/, val2017/ and annotations/; without it, scenes are generated."""
    train_images: int = 2048
    """Images to train gates on; what the transformer gets of them is kept in memory."""
    calibration_images: int = 120
    """Held-out training images for thresholds."""
    allocation_images: int = 40
    """Of these, the images on which the change of the outputs is measured to share a density among the FFNs."""
    eval_images: int = 300
    """Validation images."""
    eval_batch_size: int = 20
    """Images per batch where nothing is trained."""
    training: Annotated[GateTraining, tyro.conf.OmitArgPrefixes] = field(
        default_factory=lambda: GateTraining(batch_size=16)
    )
    tuning: GateTuning = field(default_factory=GateTuning)
    densities: tuple[float, ...] = (0.06, 0.03)
    """Mean densities per token."""
    tile_densities: tuple[tuple[int, float], ...] = ((16, 0.08), (64, 0.12))
    """Tokens per tile, and mean density of such tiles."""
    changes: tuple[float, ...] = (0.01,)
    """Bounds on the change of the detector's outputs."""
    out: Path = Path("runs/study_budgets")
    """Folder for the results."""
    resume: bool = False
    """Go on with an interrupted run in the output folder."""
    overwrite: bool = False
    """Delete an earlier run in the output folder."""


class Study:
    """The detector, its gates, data, and rows so far."""

    def __init__(self, arguments: Arguments, model: DETR):
        self.arguments = arguments
        held_out = arguments.calibration_images
        data = open_dataset(arguments.coco, "train", arguments.train_images + held_out)
        split = len(data) - held_out
        training, calibration = Subset(data, 0, split), Subset(data, split, len(data))
        validation = open_dataset(arguments.coco, "val", arguments.eval_images)
        size, batch_size = arguments.training.group_size, arguments.training.batch_size
        sample = Subset(training, 0, min(512, len(training)))
        with tqdm(total=len(sample), desc="activation statistics", unit="image") as bar:
            path = arguments.out / "activations.safetensors"
            profile = profile_activations(model, sample, batch_size, size, path, bar.update)
        self.model = permute_neurons(
            model, {n: coactivation_permutation(s.coactive, size) for n, s in profile.statistics.items()}
        )

        def embed(dataset, batch_size, title) -> list[BackboneFeatures]:
            return list(backbone_features(model, dataset, batch_size, f"embedding {title} images"))

        self.passes = CachedBatches(
            [batch.tokens for batch in embed(training, batch_size, "training")], arguments.training.seed
        )
        calibration = embed(calibration, arguments.eval_batch_size, "calibration")
        self.held_out = CachedBatches([batch.tokens for batch in calibration])
        self.change = OutputDivergence(
            self.model, calibration[: -(-arguments.allocation_images // arguments.eval_batch_size)]
        )
        self.validation = embed(validation, arguments.eval_batch_size, "validation")
        self.ground_truth, self.image_ids = validation.ground_truth(), validation.image_ids()
        self.gates = self._train()
        self.rows: list[dict] = []
        self.dense = self._score({})
        self.dense_samples = bootstrap(self.dense)

    def _train(self) -> dict[str, Thresholded]:
        arguments = self.arguments
        with tqdm(total=arguments.training.epochs * len(self.passes), desc="training gates", unit="step") as bar:

            def report(step: int, loss: jnp.ndarray) -> None:
                bar.update(step - bar.n)

            path = arguments.out / "gates"
            gates = train_gates(self.model, self.passes, {"mgs": MGS}, arguments.training, path, report)["mgs"]
        return {name: Thresholded(gate, jnp.float32(0)) for name, gate in gates.items()}

    def _score(self, selectors: Mapping[str, Thresholded]):
        group_size = self.arguments.training.group_size
        measured = measure_dataset(self.model, self.validation, selectors=dict(selectors), group_size=group_size)
        return score(self.ground_truth, measured.results, self.image_ids)

    def sensitivity(self, tile_size: int) -> SensitivityTable:
        """The gates at every density of the grid in each FFN, the others dense."""
        scores = {name: selector.score for name, selector in self.gates.items()}
        histograms = measure_scores(self.model, self.held_out, scores, tile_size=tile_size)
        settings = {
            name: [gate.at(density_threshold(histograms[name], density)) for density in GRID]
            for name, gate in self.gates.items()
        }
        return layer_sensitivity(self.change, GRID, settings)

    def tune(self, start: Mapping[str, Thresholded], budget: Budget, tuning: GateTuning) -> dict[str, Thresholded]:
        """Selectors that are trained to a budget."""
        folder = self.arguments.out / "tuned" / str(len(self.rows))
        with tqdm(total=tuning.epochs * len(self.passes), desc="training to a budget", unit="step") as bar:

            def report(step: int, progress: Progress | None) -> None:
                if progress is not None:
                    density = np.mean([float(d) for d in progress.densities.values()])
                    bar.set_postfix(loss=f"{float(progress.loss):.4f}", density=f"{density:.3f}", refresh=False)
                bar.update(step - bar.n)

            return tune_gates(self.model, self.passes, start, budget, tuning, folder, report)

    def row(
        self, asked: str, gates: str, selectors: Mapping[str, Thresholded], tile_size: int = 1, **extra: float
    ) -> None:
        """Measures selectors on the validation images, where tiles of tokens get what one of them needs."""
        scores = self._score({name: StraightThrough(s, tile_size=tile_size) for name, s in selectors.items()})
        batches = CachedBatches([batch.tokens for batch in self.validation])
        measured = {size: measure(self.model, batches, selectors, size) for size in TILE_SIZES}
        samples = bootstrap(scores) - self.dense_samples
        row = {
            "asked": asked,
            "gates": gates,
            "AP": scores.numbers["AP"],
            "AP_minus_dense": scores.numbers["AP"] - self.dense.numbers["AP"],
            "AP_minus_dense_interval": confidence_interval(samples),
            "change": measured[tile_size][0],
            "densities": {str(size): densities for size, (_, densities) in measured.items()},
            **extra,
        }
        self.rows.append(row)
        tqdm.write(" ".join(cells(row)))


def cells(row: Mapping) -> list[str]:
    """A row of the table."""
    low, high = row["AP_minus_dense_interval"]
    means = [f"{100 * np.mean(list(row['densities'][str(size)].values())):.1f} %" for size in TILE_SIZES]
    return [
        row["asked"],
        row["gates"],
        f"{100 * row['AP_minus_dense']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]",
        f"{row['change']:.4f}",
        "" if row.get("trained_to") is None else f"{100 * row['trained_to']:.1f} %",
        *means,
    ]


HEADER = ["asked", "gates", "points against dense", "change", "trained to", *(f"tiles of {s}" for s in TILE_SIZES)]


def compare_density(study: Study, density: float, tile_size: int) -> None:
    """Gates at one mean density: calibrated, then trained to it."""
    tuning = replace(study.arguments.tuning, tile_size=tile_size)
    unit = "" if tile_size == 1 else f" of tiles of {tile_size}"
    mean = MeanDensity(density)

    def add(title: str, selectors: Mapping[str, Thresholded], to: Budget = mean, **extra: float) -> None:
        met = meet(study.model, study.held_out, selectors, to, tile_size)
        asked = to.density if isinstance(to, MeanDensity) else density
        study.row(f"{100 * asked:g} %{unit}", title, met, tile_size, **extra)

    def add_tuned(title: str, start: Mapping[str, Thresholded], to: Budget, how: GateTuning) -> None:
        tuned = study.tune(start, to, how)
        _, densities = measure(study.model, study.held_out, tuned, tile_size)
        add(title, tuned, trained_to=float(np.mean(list(densities.values()))))

    sensitivity = study.sensitivity(tile_size)
    costs = np.broadcast_to(sensitivity.densities / len(sensitivity.names), sensitivity.losses.shape)

    def shared(density: float) -> tuple[DensityOfEach, dict[str, Thresholded]]:
        choice = list(greedy(sensitivity.losses, costs, density))
        densities = dict(zip(sensitivity.names, map(float, sensitivity.densities[choice]), strict=True))
        return DensityOfEach(densities), sensitivity.selectors(choice)

    shares, start = shared(density)
    add("calibrated, the same in each FFN", study.gates, DensityOfEach(dict.fromkeys(study.gates, density)))
    add("calibrated, shared greedily", start)
    add_tuned("end to end, multiplier per FFN", start, shares, tuning)
    if tile_size == 1:
        add_tuned("end to end, one multiplier", start, mean, tuning)
        if density == min(study.arguments.densities):  # there the gates differ most
            add_tuned("end to end without draws, multiplier per FFN", start, shares, replace(tuning, sampled=False))
            add_tuned("labels, multiplier per FFN", start, shares, replace(tuning, loss="firing"))
        return
    # The same start and density of tiles at the end, but trained as if every token were computed alone.
    _, per_token = measure(study.model, study.held_out, start)
    add_tuned("end to end without the union", start, DensityOfEach(per_token), replace(tuning, tile_size=1))
    for more in (1.5 * density, 2 * density):
        add("calibrated, shared greedily", shared(more)[1], MeanDensity(more))


def compare_change(study: Study, change: float) -> None:
    """Gates within one bound on the change of the outputs: calibrated, then trained to the least density."""
    asked, budget = f"change of {change:g}", MaxDivergence(change)
    start = meet(study.model, study.held_out, study.gates, budget)
    study.row(asked, "calibrated, thresholds shifted alike", start)
    tuned = study.tune(start, budget, study.arguments.tuning)
    study.row(asked, "end to end, least density", meet(study.model, study.held_out, tuned, budget))


def main(arguments: Arguments) -> None:
    started = time.perf_counter()
    model = detr_jax.load(arguments.model)
    before = detr_jax.fingerprint(model)
    settings = cli.settings(arguments) | {"fingerprint of the detector": before}
    open_run(arguments.out, settings, OUTPUTS, resume=arguments.resume, overwrite=arguments.overwrite)
    study = Study(arguments, model)
    for density in arguments.densities:
        compare_density(study, density, 1)
    for tile_size, density in arguments.tile_densities:
        compare_density(study, density, tile_size)
    for change in arguments.changes:
        compare_change(study, change)
    if detr_jax.fingerprint(model) != before:
        raise AssertionError("the frozen detector changed")
    results = {
        "model": arguments.model,
        "fingerprint": before,
        "images": len(study.image_ids),
        "dense_AP": study.dense.numbers["AP"],
        "rows": study.rows,
        "seconds": time.perf_counter() - started,
        **cli.provenance(arguments),
    }
    text = markdown_table(HEADER, [cells(row) for row in study.rows], left=2)
    print(f"\n{text}")
    with replacing(arguments.out / "study.md") as temporary:
        temporary.write_text(text)
    write_json(arguments.out / RESULTS, results)
    print(f"\nresults.json and study.md are in {arguments.out} after {math.ceil(results['seconds'])} s")


if __name__ == "__main__":
    cli.run(main, Arguments)
