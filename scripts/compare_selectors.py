"""Compares every selector on one frozen detector under one protocol."""

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import tyro
from studies.allocation_tables import within_loss
from studies.common import frozen, one_at_a_time, open_splits
from studies.comparison_plots import plot_comparison
from studies.comparison_report import comparison_markdown, comparison_sections, introduction
from studies.tile_density import describe_statistics, measure_tile_density
from studies.workbench import GRID, Workbench
from tqdm import tqdm

import detr_jax
from detr_jax.calibration.allocation import greedy
from detr_jax.calibration.thresholds import calibrate, density_threshold, measure_scores, recall_threshold
from detr_jax.commands import cli
from detr_jax.commands.options import DataOptions
from detr_jax.commands.reports import REPORT, SAMPLES, sample_sections, what_ran
from detr_jax.errors import InputError
from detr_jax.evaluation.runs import measure_dataset
from detr_jax.files import replacing
from detr_jax.methods import (
    METHODS,
    MGS,
    PAPER_THRESHOLD,
    Oracle,
    Thresholded,
    TrainedMethod,
    find_indicators,
    log_odds,
    restricted_to,
)
from detr_jax.methods.grouping import group_count
from detr_jax.models import DETR, Selector
from detr_jax.plan import Plan, save_plan
from detr_jax.run_folder import PARTS, finish_run, open_run
from detr_jax.training.gates import Gates, GateTraining
from detr_jax.viz.report import Picture, Section, write_page

SCENES_TRAINING_IMAGES = 4096
OUTPUTS = ("gates-own", "gates-ordered", "gates-tuned", PARTS, "progress.json", "plan.safetensors")
OUTPUTS += ("comparison.md", "activations.safetensors", "activations-ordered.safetensors")
FIGURES = {
    "accuracy.png": "AP against the share of the neurons that is computed and of the multiply-adds that are left.",
    "sizes.png": "AP by size of object.",
    "tile_density.png": "Density of each FFN, from active neurons to the tiles that have to be computed for them.",
    "activations.png": "Active neurons of each FFN by kind of token, and the groups that MGS computes.",
    "layers.png": "Loss of AP with one FFN gated, and with all up to one.",
}
OUTPUTS += (REPORT, *FIGURES)


@dataclass(frozen=True)
class Arguments:
    """Compares every selector on one frozen detector: accuracy against density, with paired confidence intervals.

    Without options: detr-tiny on 500 generated scenes, about half an hour on two cores. On COCO, for example:
    `python scripts/compare_selectors.py --model detr-r50 --coco coco --eval-images 500 --out runs/compare-r50`.
    Writes results.json, comparison.md and figures into the output folder, and report.html, which has all of it and
    sample images in one file.
    """

    model: str = "detr-tiny"
    """Name of a detector or path of a checkpoint."""
    preset: str | None = None
    """Architecture of a checkpoint that does not say which it is, e.g. detr-r50."""
    data: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=DataOptions)
    train_images: int | None = None
    """Images to train gates on; default 4096 scenes, or all of COCO's training images that are not held out. What the
    transformer gets of all images is kept in memory."""
    calibration_images: int = 120
    """Held-out training images for thresholds."""
    allocation_images: int = 40
    """Of these, the images on which the change of the outputs is measured to share a density among the FFNs."""
    statistics_images: int = 512
    """Training images for activation statistics."""
    eval_images: int = 500
    """Validation images."""
    eval_batch_size: int = 20
    """Images per batch where nothing is trained."""
    neuron_order: Literal["own", "coactivation", "kmeans"] = "coactivation"
    """Order of the hidden neurons for all selectors of groups."""
    training: Annotated[GateTraining, tyro.conf.OmitArgPrefixes] = field(
        default_factory=lambda: GateTraining(batch_size=16)
    )
    tuning_epochs: int = 2
    """More passes for MGS's gates while they are all in effect."""
    methods: tuple[str, ...] = tuple(name for name, method in METHODS.items() if method.tuned_by != "nothing")
    """Selectors with a threshold to compare."""
    densities: tuple[float, ...] = (0.5, 0.3, 0.2, 0.1, 0.05, 0.03)
    """Mean densities of each."""
    mgs_density: float = 0.06
    """Mean density at which the ingredients of MGS are compared."""
    mgs_change: float = 1e-3
    """Change of the detector's outputs that each FFN may cause, where MGS's densities are given by that."""
    sibs_taus: tuple[float, ...] = (1.0, 0.999, 0.99, 0.95, 0.9)
    """Certainties of SIBS, see `detr_jax.methods.sibs`."""
    sibs_indicators: int = 64
    """Indicators of SIBS for each FFN."""
    costs: Path | None = None
    """JSON file {ffn: {density: cost}} with what each FFN costs at each density, e.g. measured milliseconds. Densities
    are then shares of the dense cost. By default density itself is the cost."""
    out: Path = Path("runs/compare_selectors")
    """Folder for the results."""
    resume: bool = False
    """Go on with an interrupted run in the output folder."""
    overwrite: bool = False
    """Delete an earlier run in the output folder."""


def check(arguments: Arguments, model: DETR) -> None:
    """Refuses what cannot be computed, before anything is."""
    for spec in model.ffn_specs().values():
        group_count(spec.hidden, arguments.training.group_size)
    if unknown := set(arguments.methods) - set(METHODS):
        raise InputError(f"there are no selectors {sorted(unknown)}; there are {', '.join(METHODS)}")
    for density in (*arguments.densities, arguments.mgs_density):
        if not GRID[-1] <= density < 1:
            raise InputError(f"densities must be from {GRID[-1]} to below 1, not {density}")
    if not 1 <= arguments.allocation_images <= arguments.calibration_images:
        raise InputError(
            f"--allocation-images must be from 1 to --calibration-images {arguments.calibration_images}, not "
            f"{arguments.allocation_images}"
        )


def compare_bounds(bench: Workbench) -> None:
    """What knowing the activations would give."""
    for title, size in (("neurons", 1), ("groups", bench.arguments.training.group_size)):
        oracles = dict.fromkeys(bench.weights, Oracle(size))
        bench.row("bounds", "oracle", title, model=bench.ordered, selectors=lambda oracles=oracles: oracles)


def compare_methods(bench: Workbench, gates: Mapping[str, Gates]) -> None:
    """Every selector with a threshold, at every density."""
    arguments = bench.arguments
    settings = {density: f"density {density:g}" for density in arguments.densities}
    for method in tqdm(arguments.methods, desc="comparing", unit="selector"):
        if all(f"methods: {method}, {setting}" in bench.rows for setting in settings.values()):
            continue
        if METHODS[method].shares_density:
            for density, setting in settings.items():
                selectors = partial(bench.at_mean_density, method, density)
                bench.row("methods", method, setting, model=bench.ordered, selectors=selectors)
            continue
        sensitivity = bench.sensitivity(method, gates)
        costs = bench.costs(sensitivity)
        for density, setting in settings.items():
            choice = greedy(sensitivity.losses, costs, density)
            bench.row("methods", method, setting, model=bench.ordered, selectors=partial(sensitivity.selectors, choice))


def compare_sibs(bench: Workbench) -> None:
    """SIBS, whose sparsity is what its certainty makes of it; it decides about neurons, in any order of them."""

    def find(tau: float, indicators: int) -> dict[str, Selector]:
        return {
            name: find_indicators(s, tau=tau, indicators=indicators, name=name) for name, s in bench.statistics.items()
        }

    row = partial(bench.row, "sibs", "sibs", model=bench.ordered)
    row("no indicators: without neurons that never fire", selectors=partial(find, 1.0, 0))
    for tau in bench.arguments.sibs_taus:
        row(f"tau {tau:g}", selectors=partial(find, tau, bench.arguments.sibs_indicators))


def compare_mgs(bench: Workbench, own: Gates, gates: Mapping[str, Gates]) -> dict[str, Thresholded]:
    """What each ingredient does for MGS with all FFNs gated, beginning with the paper's recipe.

    Returns:
        the selectors of the last row: the paper's labels, all ingredients.
    """
    arguments, order = bench.arguments, bench.arguments.neuron_order
    density = arguments.mgs_density
    equal = partial(density_threshold, density=density)
    found = partial(recall_threshold, recall=0.99)
    for title, model, of in (("own", bench.own, own), (order, bench.ordered, gates["mgs"])):
        row = partial(bench.row, "mgs", f"mgs, {title} order", model=model)
        row(f"threshold {PAPER_THRESHOLD}", selectors=partial(at_paper_threshold, of))
        row("recall 0.99", selectors=partial(calibrate, model, bench.held_out, of, found))
        row(f"density {density:g} in each FFN", selectors=partial(calibrate, model, bench.held_out, of, equal))

    shared, densities = {}, {}
    methods = ("mgs", "mgs-contribution")
    for method in methods:
        row = partial(bench.row, "mgs", f"{method}, {order} order", model=bench.ordered)
        sensitivity = bench.sensitivity(method, gates)
        costs = bench.costs(sensitivity)
        choice = greedy(sensitivity.losses, costs, density)
        shared[method] = sensitivity.selectors(choice)
        densities[method] = dict(zip(sensitivity.names, sensitivity.densities[list(choice)], strict=True))
        row(f"density {density:g} shared greedily", selectors=partial(sensitivity.selectors, choice))
        bound = arguments.mgs_change
        row(
            f"change of at most {bound:g} by each FFN",
            selectors=partial(sensitivity.selectors, within_loss(sensitivity.losses, bound)),
        )

    training = dataclasses.replace(
        arguments.training, epochs=arguments.tuning_epochs, learning_rate=arguments.training.learning_rate / 3
    )
    trained = [training.method(METHODS[method]) for method in methods]
    tuned = bench.train(bench.ordered, trained, "gates-tuned", shared)
    for method in reversed(methods):
        histograms = measure_scores(bench.ordered, bench.held_out, tuned[method], shared[method])
        selectors = {
            name: Thresholded(gate, jnp.float32(density_threshold(histograms[name], densities[method][name])))
            for name, gate in tuned[method].items()
        }
        setting = f"density {density:g} shared greedily, trained with the others on"
        bench.row("mgs", f"{method}, {order} order", setting, model=bench.ordered, selectors=lambda s=selectors: s)
    return selectors


def at_paper_threshold(gates: Gates) -> dict[str, Thresholded]:
    """Gates with the paper's threshold in all FFNs."""
    return {name: Thresholded(gate, jnp.float32(log_odds(PAPER_THRESHOLD))) for name, gate in gates.items()}


def compare_layers(bench: Workbench, gates: Gates) -> None:
    """Which FFNs cost the accuracy, at the paper's threshold."""
    whole = at_paper_threshold(gates)
    for title, some in one_at_a_time(whole).items():
        active = restricted_to(whole, some)
        bench.row("layers", "mgs", title, model=bench.ordered, selectors=lambda some=some: some, active=active)


def save_best(bench: Workbench, selectors: Mapping[str, Selector], results: dict, path: Path) -> Plan:
    """Keeps MGS with all ingredients as a plan, which scripts/evaluate.py takes, and returns it."""
    row = next(r for r in reversed(results["rows"]) if r["section"] == "mgs")
    measured = {key: value for key, value in row.items() if key not in ("section", "category_AP")}
    measured |= {"data": results["data"]["validation"], "images": results["images"]}
    measured |= {"implementation": results["implementation"], "device": results["device"]}
    training = {"recipe": results["arguments"]["training"], "data": results["data"]}
    training |= {"order": bench.arguments.neuron_order}
    plan = Plan(
        "mgs", results["fingerprint"], dict(selectors), bench.permutations, training, measured, results["versions"]
    )
    save_plan(plan, path, overwrite=True)
    return plan


def main(arguments: Arguments) -> None:
    started = time.perf_counter()
    model = detr_jax.load(arguments.model, preset=arguments.preset)
    check(arguments, model)
    wanted, group_size = arguments.train_images, arguments.training.group_size
    if arguments.data.generated and wanted is None:
        wanted = SCENES_TRAINING_IMAGES
    splits = open_splits(arguments.data, model, wanted, arguments.calibration_images, arguments.eval_images)
    with frozen(model) as fingerprint:
        settings = cli.settings(arguments, detector=fingerprint, **splits.fingerprints)
        open_run(arguments.out, settings, OUTPUTS, resume=arguments.resume, overwrite=arguments.overwrite)
        bench = Workbench(arguments, model, splits)
        own = bench.train(bench.own, [arguments.training.method(MGS)], "gates-own")["mgs"]
        wanted = [arguments.training.method(METHODS[n]) for n in ("mgs", "mgs-contribution", *arguments.methods)]
        trained = dict.fromkeys(method.gates for method in wanted if isinstance(method, TrainedMethod))
        gates = bench.train(bench.ordered, list(trained), "gates-ordered")

        bench.row("dense", "dense", "", model=bench.own, selectors=dict)
        compare_bounds(bench)
        best = compare_mgs(bench, own, gates)
        compare_layers(bench, gates["mgs"])
        compare_sibs(bench)
        compare_methods(bench, gates)
        bench.finish_rows()
        first = bench.validation[: math.ceil(SAMPLES / arguments.eval_batch_size)]
        samples = [
            measure_dataset(detector, first, selectors=selectors, group_size=group_size).results
            for detector, selectors in ((bench.own, {}), (bench.ordered, best))
        ]
        half = at_paper_threshold(gates["mgs"])
        tile_density = measure_tile_density(bench.ordered, bench.validation, half, group_size)

    results = {
        "model": arguments.model,
        "fingerprint": fingerprint,
        "data": splits.names,
        "images": len(bench.comparison.image_ids),
        "implementation": "masked reference",
        "flops": dataclasses.asdict(bench.comparison.flops),
        "statistics": describe_statistics(bench.profile),
        "tile_density": tile_density,
        "rows": list(bench.rows.by_key.values()),
        "seconds": time.perf_counter() - started,
        **cli.provenance(arguments),
    }
    markdown = comparison_markdown(results)
    print(f"\n{markdown}")
    with replacing(arguments.out / "comparison.md") as temporary:
        temporary.write_text(markdown, encoding="utf-8")
    plot_comparison(results, arguments.out)
    plan = save_best(bench, best, results, arguments.out / "plan.safetensors")
    sparse = detr_jax.SparseDETR.of_checked(model, plan)
    sections = [
        what_ran(results, splits.names),
        Section("What is compared", introduction(results)),
        *comparison_sections(results),
        Section("Figures", [Picture.read(arguments.out / name, caption) for name, caption in FIGURES.items()]),
        *sample_sections(sparse, splits.validation, *samples, f"MGS, {plan.measured['setting']}"),
    ]
    write_page(arguments.out / REPORT, f"Selectors on {arguments.model}", sections)
    finish_run(arguments.out, results)
    written = f"results.json, comparison.md, figures and {REPORT}"
    print(f"{written} are in {arguments.out} after {math.ceil(results['seconds'])} s")


if __name__ == "__main__":
    cli.run(main, Arguments)
