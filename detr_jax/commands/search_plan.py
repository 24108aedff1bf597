"""`search-plan`: the plan that is fastest on this device, or sparsest, within a budget."""

import itertools
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from tqdm import tqdm

import detr_jax
from detr_jax.commands import cli
from detr_jax.commands.options import DataOptions
from detr_jax.data.dataset import Dataset, Subset
from detr_jax.data.features import backbone_features
from detr_jax.errors import InputError
from detr_jax.evaluation.coco_ap import require_usable_ap
from detr_jax.evaluation.comparison import Comparison, Row
from detr_jax.models import Detector
from detr_jax.plan import Plan, save_plan
from detr_jax.run_folder import finish_run, open_run, versions
from detr_jax.search.candidates import CANDIDATE_KINDS
from detr_jax.search.search import PlanSearch, SearchSettings
from detr_jax.viz.figures import plot_search, save_figure
from detr_jax.viz.tables import points_of_ap, table

OUTPUTS = ("plan.safetensors", "search.png")
BUDGETS = ("density", "latency", "ap-loss")
SHARES = tuple(np.geomspace(0.9, 0.04, 28).tolist())
"""Shares of the dense FFNs' time among which a bound on the loss of AP is searched."""


@dataclass(frozen=True)
class Arguments:
    """Searches a plan: whether each FFN stays dense, computes a fixed set of neurons, or narrow experts, and how many
    neurons of each.

    Accuracy is measured by the divergence of the detector's outputs, run time on this device, the selector's own work
    included. The budget is one of

    - ap-loss=0.5: the fastest plan that loses at most so many points of AP on held-out training images;
    - latency=0.4: the most accurate one whose FFNs take at most such a share of the dense ones' time;
    - density=0.2: the most accurate one that computes at most such a share of the hidden neurons.

    Without options: detr-tiny on generated scenes. Writes plan.safetensors, results.json and search.png into the output
    folder, with fixed sets alone beside the plan. `detr-jax evaluate` and `scripts/benchmarks/plan.py` take it.
    """

    budget: str = "ap-loss=0.5"
    """ap-loss=POINTS, latency=SHARE or density=SHARE."""
    model: str = "detr-tiny"
    """Name of a detector or path of a checkpoint."""
    preset: str | None = None
    """Architecture of a checkpoint that does not say which it is, e.g. detr-r50."""
    data: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=DataOptions)
    search: Annotated[SearchSettings, tyro.conf.OmitArgPrefixes] = field(default_factory=SearchSettings)
    accuracy_images: int = 400
    """Other held-out training images, on which ap-loss is measured."""
    eval_images: int = 500
    """Validation images."""
    out: Path = Path("runs/search_plan")
    """Folder for the results."""
    overwrite: bool = False
    """Delete an earlier run in the output folder."""


def read_budget(text: str) -> tuple[str, float]:
    """The kind of a budget and its number; an InputError if it is none."""
    kind, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = np.nan
    if kind not in BUDGETS or not value > 0 or (kind != "ap-loss" and value > 1):
        raise InputError(
            f"{text!r} is no budget: ap-loss=0.5 (points), latency=0.4 or density=0.2 (shares up to 1) would be"
        )
    return kind, value


def open_data(arguments: Arguments, model: Detector) -> dict[str, Dataset]:
    """Training images for statistics, others for thresholds, others for AP, and validation images."""
    settings = arguments.search
    held_out = settings.calibration_images + arguments.accuracy_images
    training = arguments.data.open("train", settings.statistics_images + held_out)
    if len(training) <= held_out:
        raise InputError(f"{training.name} has {len(training)} images, too few to hold out {held_out}")
    validation = arguments.data.open("val", arguments.eval_images)
    training, validation = arguments.data.matched(model.labels, training, validation)
    ends = (0, len(training) - held_out, len(training) - arguments.accuracy_images, len(training))
    parts = [Subset(training, *part) for part in itertools.pairwise(ends)]
    return dict(zip(("statistics", "calibration", "accuracy"), parts, strict=True)) | {"validation": validation}


def comparison_on(dataset: Dataset, model: Detector, settings: SearchSettings, title: str) -> Comparison:
    """Measures the dense detector on images, and is ready for plans."""
    features = list(backbone_features(model, dataset, settings.batch_size, title))
    return Comparison(model, dataset, features, group_size=1)


def measure(comparison: Comparison, search: PlanSearch, choice: dict[str, int]) -> Row:
    """AP of a choice in the masked reference and its difference to dense, densities and work; see `Comparison.row`."""
    trials = {name: candidate.trial for name, candidate in search.chosen(choice).items()}
    return comparison.row(trials, comparison.detect(search.model, trials))


def within_loss(search: PlanSearch, comparison: Comparison, points: float, kinds: Sequence[str]) -> dict[str, int]:
    """The fastest choice that loses at most so many points of AP on the compared images, by bisection."""
    choices = [dict.fromkeys(search.names, 0), *search.choices(SHARES, kinds)]
    good, bad = 0, len(choices)
    with tqdm(desc=f"AP, {' and '.join(kinds)}", unit="plan") as bar:
        while bad - good > 1:
            middle = (good + bad) // 2
            lost = -100 * measure(comparison, search, choices[middle])["AP_minus_dense"]
            bar.set_postfix(points=f"{-lost:+.2f}")
            bar.update()
            good, bad = (middle, bad) if lost <= points else (good, middle)
    return choices[good]


def plan_of(
    search: PlanSearch,
    fingerprint: str,
    choice: dict[str, int],
    measured: Row,
    arguments: Arguments,
    data: dict[str, Any],
) -> Plan:
    """The plan of a choice, in the detector's own numbering of its neurons."""
    chosen = search.chosen(choice)
    selectors = {name: c.selector for name, c in chosen.items() if c.selector is not None}
    permutations = {name: chosen[name].order for name in selectors}
    training = {"budget": arguments.budget, "data": data} | cli.settings(arguments)
    return Plan("search", fingerprint, selectors, permutations, training, measured, versions())


CHOICES = {
    "any": CANDIDATE_KINDS,
    "fixed sets, reconstructed or not": ("dense", "fixed", "fixed, reconstructed"),
    "fixed sets": ("dense", "fixed"),
}
"""Kinds of candidates of the search, and of two narrower ones beside it."""
CURVE = (0.6, 0.5, 0.4, 0.33, 0.27, 0.22, 0.18, 0.14, 0.1, 0.06, 0.04)
"""Shares of the dense FFNs' time and density at which the figure shows the accuracy."""


def point(comparison: Comparison, search: PlanSearch, choice: dict[str, int], time_share: float) -> Row:
    """A point of the figure."""
    row = measure(comparison, search, choice)
    keys = ("AP_minus_dense", "AP_minus_dense_interval", "AP_interval", "numbers", "density")
    return {key: row[key] for key in keys} | {"time": time_share, "ffn_work": row["flops_share"]["ffns"]}


def main(arguments: Arguments) -> None:
    """Runs the command."""
    started = time.perf_counter()
    kind, bound = read_budget(arguments.budget)
    model = detr_jax.load(arguments.model, preset=arguments.preset)
    settings = arguments.search
    settings.check()
    data = open_data(arguments, model)
    names = {use: dataset.name for use, dataset in data.items()}
    fingerprint = detr_jax.fingerprint(model)
    fingerprints = {"detector": fingerprint} | {use: dataset.fingerprint for use, dataset in data.items()}
    open_run(arguments.out, cli.settings(arguments, **fingerprints), OUTPUTS, overwrite=arguments.overwrite)
    if kind == "ap-loss":
        comparison = comparison_on(data["accuracy"], model, settings, "embedding images for AP")
        require_usable_ap(comparison.dense)
    search = PlanSearch(model, data["statistics"], data["calibration"], settings)
    if kind == "ap-loss":
        choices = {title: within_loss(search, comparison, bound, kinds) for title, kinds in CHOICES.items()}
    else:
        choices = {title: search.choose(kind, bound, kinds) for title, kinds in CHOICES.items()}

    # Measured again, in turns: candidates chosen for their speed are on average not quite as fast.
    chosen = {title: search.chosen(choice) for title, choice in choices.items()}
    ways = {
        name: [(c.selector, c.order) for c in (search.candidates[name][0], *(of[name] for of in chosen.values()))]
        for name in search.names
    }
    seconds = search.times(ways, "timing the plan")
    dense, *others = np.sum(list(seconds.values()), axis=0).tolist()
    shares = {title: other / dense for title, other in zip(choices, others, strict=True)}

    comparison = comparison_on(data["validation"], model, settings, "embedding validation images")
    measured = {title: point(comparison, search, choice, shares[title]) for title, choice in choices.items()}
    curves = {
        unit: {
            title: [
                point(comparison, search, choice, search.time(choice))
                for choice in tqdm(search.choices(CURVE, kinds, unit), desc=f"{title} by {unit}", unit="plan")
            ]
            for title, kinds in CHOICES.items()
        }
        for unit in ("latency", "density")
    }
    plan = plan_of(search, fingerprint, choices["any"], measured["any"], arguments, names)
    save_plan(plan, arguments.out / "plan.safetensors", overwrite=True)
    ffns = {
        name: {
            "kind": candidate.kind,
            "density": candidate.density,
            "dense_seconds": float(seconds[name][0]),
            "seconds": float(seconds[name][1]),
        }
        for name, candidate in chosen["any"].items()
    }
    report(measured, ffns)
    title = f"{arguments.model}, {arguments.budget}, {names['validation']}, {jax.devices()[0].device_kind}"
    save_figure(plot_search(title, curves, measured["any"], ffns), arguments.out / "search.png")
    candidates = {
        name: [
            {"kind": c.kind, "density": c.density, "loss": float(loss)}
            | {"seconds": float(chosen_by), "seconds_again": float(again)}
            for c, loss, chosen_by, again in zip(
                of, search.losses[name], search.seconds[name], search.retimed[name], strict=True
            )
        ]
        for name, of in search.candidates.items()
    }
    taken = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    results = {"choices": measured, "ffns": ffns, "curves": curves, "candidates": candidates, "data": names}
    results |= {"seconds": taken, "peak_memory_bytes": peak}
    finish_run(arguments.out, results | cli.provenance(arguments))
    print(f"\nplan.safetensors, results.json and search.png are in {arguments.out}")
    print(f"after {taken:.0f} s, with at most {peak / 1e9:.1f} GB of memory")


def report(measured: dict[str, Row], ffns: dict[str, dict[str, Any]]) -> None:
    """Prints the selection of each FFN and its run time, and the accuracy of each choice."""
    lines = []
    for name, ffn in ffns.items():
        dense, plan = 1e3 * ffn["dense_seconds"], 1e3 * ffn["seconds"]
        lines.append((name, ffn["kind"], ffn["density"], dense, plan, dense / plan))
    print(f"\n{table(('FFN', 'computes', 'neurons', 'dense ms', 'plan ms', 'faster'), lines)}\n")
    rows = [
        (title, row["numbers"]["AP"], points_of_ap(row), row["density"], 1 / row["time"])
        for title, row in measured.items()
    ]
    print(table(("", "AP", "points against dense", "neurons", "FFNs faster"), rows))
