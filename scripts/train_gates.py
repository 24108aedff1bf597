"""Trains MGS gates for every FFN of a frozen detector and measures what they cost and save."""

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
import tyro
from scipy.special import expit
from tqdm import tqdm

import detr_jax
from detr_jax.calibration.activation_passes import profile_activations
from detr_jax.calibration.permutation import coactivation_permutation, kmeans_permutation
from detr_jax.calibration.threshold_passes import calibrate
from detr_jax.calibration.thresholds import recall_threshold
from detr_jax.commands import cli
from detr_jax.commands.execution_options import ExecutionOptions
from detr_jax.data.batches import CachedBatches, ImageBatches
from detr_jax.data.dataset import Dataset, Subset
from detr_jax.data.features import backbone_features
from detr_jax.data.registry import open_dataset
from detr_jax.errors import InputError
from detr_jax.evaluation.coco_ap import CocoScores, bootstrap, bootstrap_difference, confidence_interval, score
from detr_jax.evaluation.runs import measure_dataset
from detr_jax.files import write_json
from detr_jax.mesh import is_first_process, mesh_of, replicate
from detr_jax.methods import MGS, PAPER_THRESHOLD, Thresholded, log_odds
from detr_jax.methods.grouping import group_count
from detr_jax.models import DETR
from detr_jax.plan import Plan, save_plan
from detr_jax.run_folder import RESULTS, open_run
from detr_jax.training.budgets import Density, GateTuning, MaxDivergence, Progress, TrainedBudget, meet, tune_gates
from detr_jax.training.gates import Gates, GateTraining, train_gates
from detr_jax.viz.figures import GatedRun, plot_gates, save_figure
from detr_jax.viz.tables import gate_table, table

Selection = dict[str, Thresholded]


@dataclass(frozen=True)
class Arguments:
    """Trains MGS gates for every FFN of a frozen detector, calibrates their thresholds, and measures AP and sparsity.

    Without options: detr-tiny on generated scenes. On COCO, for example:
    `python scripts/train_gates.py --model detr-r50 --coco coco --batch-size 2 --out runs/gates-r50`.
    Writes plan.safetensors, results.json and gates.png into the output folder.
    """

    model: str = "detr-tiny"
    """Name of a detector or path of a checkpoint."""
    preset: str | None = None
    """Architecture of a checkpoint that does not say which it is, e.g. detr-r50."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the detector's computation; gates are float32."""
    coco: Path | None = None
    """Folder with train2017/, val2017/ and annotations/; without it, scenes are generated."""
    train_images: int | None = None
    """Images to train on; default 4096 scenes, or all of COCO's training images that are not held out."""
    calibration_images: int = 128
    """Held-out training images for the thresholds."""
    recipe: Literal["default", "paper"] = "default"
    """default: groups by co-firing, and a threshold for each layer; paper: the detector's own groups, and one threshold
    for all."""
    order: Literal["own", "cofiring", "kmeans"] | None = None
    """Order of the hidden neurons, which decides what is a group: the detector's own, those together that fire together
    on training images, or those together that have similar input weights; default what the recipe says."""
    order_images: int = 256
    """Training images for the order by firing."""
    eval_images: int | None = None
    """Evaluate the first so many validation images; default all."""
    training: Annotated[GateTraining, tyro.conf.OmitArgPrefixes] = field(default_factory=GateTraining)
    threshold: float = PAPER_THRESHOLD
    """Uniform threshold that is reported beside the calibrated ones."""
    recall: float = 0.99
    """Share of the firing groups that each gate must find at its calibrated threshold."""
    density: float | None = None
    """Also train the gates, all in effect, to this mean density over the FFNs; what the plan then holds."""
    output_divergence: float | None = None
    """Also train the gates, all in effect, to the least mean density at which the detector's outputs change by this
    much, see `detr_jax.models.detr.divergence`; what the plan then holds."""
    tuning: GateTuning = field(default_factory=GateTuning)
    computation: Annotated[ExecutionOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=ExecutionOptions)
    each_layer: bool = False
    """Also measure AP with each FFN alone gated at the uniform threshold."""
    out: Path = Path("runs/train_gates")
    """Folder for the results."""
    resume: bool = False
    """Go on with an interrupted run in the output folder."""
    overwrite: bool = False
    """Delete an earlier run in the output folder."""


SCENES_TRAINING_IMAGES = 4096
OUTPUTS = ("checkpoints", "tuned", "activations.safetensors", "plan.safetensors", "gates.png")


def open_training_data(arguments: Arguments) -> tuple[Dataset, Dataset]:
    """Disjoint images to train on and to calibrate on."""
    held_out = arguments.calibration_images
    wanted = arguments.train_images
    if arguments.coco is None:
        wanted = SCENES_TRAINING_IMAGES if wanted is None else wanted
    images = None if wanted is None else wanted + held_out
    dataset = open_dataset(arguments.coco, "train", images)
    if len(dataset) <= held_out:
        raise InputError(f"{dataset.name} has {len(dataset)} images, too few to hold out {held_out} for calibration")
    split = len(dataset) - held_out
    return Subset(dataset, 0, split), Subset(dataset, split, len(dataset))


def find_orders(model: DETR, dataset: Dataset, arguments: Arguments) -> dict[str, np.ndarray]:
    """The order of every FFN's hidden neurons; empty for the detector's own."""
    size = arguments.training.group_size
    if arguments.order == "kmeans":
        ffns = tqdm(model.ffns.items(), desc="ordering neurons", unit="FFN")
        return {name: kmeans_permutation(np.asarray(ffn.w_in[...]), size) for name, ffn in ffns}
    if arguments.order == "own":
        return {}
    sample = Subset(dataset, 0, min(arguments.order_images, len(dataset)))
    with tqdm(total=len(sample), desc="counting co-firing", unit="image") as bar:
        path = arguments.out / "activations.safetensors"
        profile = profile_activations(model, sample, arguments.training.batch_size, size, path, bar.update)
    return {
        name: coactivation_permutation(statistics.coactive, size) for name, statistics in profile.statistics.items()
    }


def train(model: DETR, dataset: Dataset, arguments: Arguments) -> tuple[Gates, float | None]:
    """The gates, and the images per second of the steps after the first ones, which compile."""
    passes = ImageBatches(model, dataset, arguments.training.batch_size, arguments.training.seed)
    total = arguments.training.epochs * len(passes)
    times: list[float] = []
    with tqdm(total=total, desc="training gates", unit="step") as bar:

        def report(step: int, loss: jnp.ndarray) -> None:
            bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)  # waits for the step, so the times are its times
            bar.update(step - bar.n)
            times.append(time.perf_counter())

        folder = arguments.out / "checkpoints"
        methods = {"mgs": arguments.training.method(MGS)}
        steps = arguments.training.checkpoint_steps
        gates = train_gates(model, passes, methods, folder, report, checkpoint_steps=steps)["mgs"]
    steps = np.diff(times)
    # The median leaves out the steps that compiled a new shape.
    return gates, float(arguments.training.batch_size / np.median(steps)) if len(steps) > 1 else None


def budget_of(arguments: Arguments) -> TrainedBudget | None:
    """The budget that is asked for, and what is wrong with it."""
    if arguments.density is not None and arguments.output_divergence is not None:
        raise InputError("--density and --output-change are different budgets; choose one")
    if arguments.density is not None:
        return Density(arguments.density)
    return None if arguments.output_divergence is None else MaxDivergence(arguments.output_divergence)


def train_to(
    budget: TrainedBudget,
    model: DETR,
    gates: Mapping[str, Thresholded],
    training_data: Dataset,
    calibration_data: Dataset,
    arguments: Arguments,
) -> Selection:
    """Gates that are trained to a budget, with thresholds that meet it on held-out images."""
    tuning, batch_size = arguments.tuning, arguments.training.batch_size
    stored = backbone_features(model, calibration_data, batch_size, "embedding calibration images")
    held_out = CachedBatches([batch.tokens for batch in stored], mesh=mesh_of(model))
    passes = ImageBatches(model, training_data, batch_size, arguments.training.seed)
    start = meet(model, held_out, gates, budget)
    with tqdm(total=tuning.epochs * len(passes), desc="training to a budget", unit="step") as bar:

        def report(step: int, progress: Progress | None) -> None:
            if progress is not None:
                density = np.mean([float(of_one) for of_one in progress.densities.values()])
                bar.set_postfix(loss=f"{float(progress.loss):.4f}", density=f"{density:.3f}", refresh=False)
            bar.update(step - bar.n)

        tuned = tune_gates(model, passes, start, budget, tuning, arguments.out / "tuned", report)
    return meet(model, held_out, tuned, budget)


def measure(
    title: str, model: DETR, dataset: Dataset, ground_truth: dict, selectors: Selection, arguments: Arguments
) -> tuple[GatedRun, CocoScores]:
    """AP and firing counts with some FFNs gated."""
    batches = backbone_features(model, dataset, arguments.training.batch_size, title)
    computed = arguments.computation.of(selectors)
    measured = measure_dataset(model, batches, selectors=computed, group_size=arguments.training.group_size)
    scores = score(ground_truth, measured.results, dataset.image_ids())
    interval = confidence_interval(bootstrap(scores))
    return GatedRun(title, scores.numbers["AP"], interval, measured.counts), scores


def probability(selector: Thresholded) -> float:
    """The threshold of a gate as a probability."""
    return float(expit(selector.threshold))


def as_json(run: GatedRun, scores: CocoScores, dense: CocoScores, selectors: Selection) -> dict:
    """A run as results.json holds it."""
    columns = ("recall", "precision", "group_sparsity", "neuron_sparsity", "zeros")
    return {
        "numbers": scores.numbers,
        "AP_interval": run.ap_interval,
        "AP_minus_dense_interval": confidence_interval(bootstrap_difference(scores, dense)),
        "mean_group_sparsity": float(np.mean([c.group_sparsity for c in run.counts.values()])),
        "ffns": {
            name: {"threshold": probability(selectors[name]) if name in selectors else None}
            | {column: getattr(counts, column) for column in columns}
            for name, counts in run.counts.items()
        },
    }


def main(arguments: Arguments) -> None:
    started = time.perf_counter()
    if arguments.order is None:
        arguments = dataclasses.replace(arguments, order="own" if arguments.recipe == "paper" else "cofiring")
    model = replicate(detr_jax.load(arguments.model, preset=arguments.preset, dtype=jnp.dtype(arguments.dtype)))
    for spec in model.ffn_specs().values():
        group_count(spec.hidden, arguments.training.group_size)
    for name in ("threshold", "recall"):
        if not 0 <= getattr(arguments, name) <= 1:
            raise InputError(f"--{name} must be between 0 and 1, not {getattr(arguments, name)}")
    budget = budget_of(arguments)
    training_data, calibration_data = open_training_data(arguments)
    validation = open_dataset(arguments.coco, "val", arguments.eval_images)
    before = detr_jax.fingerprint(model)
    settings = cli.settings(arguments) | {"fingerprint of the detector": before}
    open_run(arguments.out, settings, OUTPUTS, resume=arguments.resume, overwrite=arguments.overwrite)

    orders = find_orders(model, training_data, arguments)
    ordered = model.with_permutations(orders)
    gates, images_per_second = train(ordered, training_data, arguments)
    threshold = jnp.float32(log_odds(arguments.threshold))
    uniform = {name: Thresholded(gate, threshold) for name, gate in gates.items()}
    ground_truth = validation.ground_truth()
    selections = {"dense": {}, f"all gated, threshold {arguments.threshold:g}": uniform}
    if arguments.recipe == "default":
        batch_size = arguments.training.batch_size
        held_out = ImageBatches(ordered, calibration_data, batch_size, progress="calibrating thresholds")
        found = partial(recall_threshold, recall=arguments.recall)
        selections[f"all gated, recall {arguments.recall:g}"] = calibrate(ordered, held_out, gates, found)
    if budget is not None:
        tuned = train_to(budget, ordered, uniform, training_data, calibration_data, arguments)
        selections[f"all gated, {budget.title}"] = tuned
    together = list(selections)[1:]
    best_title = together[-1]
    if arguments.each_layer:
        selections |= {f"{name} alone, threshold {arguments.threshold:g}": {name: uniform[name]} for name in uniform}
    runs = {
        title: measure(title, ordered, validation, ground_truth, selection, arguments)
        for title, selection in selections.items()
    }
    if detr_jax.fingerprint(model) != before:
        raise AssertionError("the frozen detector changed")
    if not is_first_process():
        return

    dense_run, dense_scores = runs["dense"]
    results = {title: as_json(run, scores, dense_scores, selections[title]) for title, (run, scores) in runs.items()}
    for title in together:
        print(f"\n{title}")
        print(gate_table(runs[title][0].counts, {n: probability(g) for n, g in selections[title].items()}))
    rows = []
    for title, result in results.items():
        low, high = result["AP_minus_dense_interval"]
        ap = result["numbers"]["AP"]
        difference = "" if title == "dense" else f"{ap - dense_run.ap:+.3f} [{low:+.3f}, {high:+.3f}]"
        sparsity = 0.0 if title == "dense" else result["mean_group_sparsity"]
        rows.append([title, ap, "[{:.3f}, {:.3f}]".format(*result["AP_interval"]), difference, sparsity])
    print(f"\nAP on {len(validation)} images of {validation.name}, 95 % intervals over images")
    print(table(("FFNs", "AP", "interval", "minus dense (paired)", "mean group sparsity"), rows))

    provenance = cli.provenance(arguments)
    training = {
        "recipe": provenance["arguments"]["training"],
        "data": training_data.name,
        "order": arguments.order,
    }
    if arguments.recipe == "default":
        training["calibration"] = {"data": calibration_data.name, "recall": arguments.recall}
    if budget is not None:
        training["calibration"] = {"data": calibration_data.name, "budget": budget.title}
        training["tuning"] = provenance["arguments"]["tuning"]
    measured = {
        "data": validation.name,
        "images": len(validation),
        "implementation": arguments.computation.implementation,
        "device": provenance["device"],
        "dense_AP": dense_run.ap,
        **{key: results[best_title][key] for key in ("numbers", "AP_interval", "mean_group_sparsity", "ffns")},
    }
    plan = Plan("mgs", before, selections[best_title], orders, training, measured, provenance["versions"])
    save_plan(plan, arguments.out / "plan.safetensors", overwrite=True)
    figure = plot_gates(
        f"MGS on {arguments.model}, {len(validation)} images of {validation.name}, "
        f"groups of {arguments.training.group_size}" + (f" by {arguments.order}" if orders else ""),
        dense_run,
        [runs[title][0] for title in together],
    )
    save_figure(figure, arguments.out / "gates.png")
    seconds = time.perf_counter() - started
    write_json(
        arguments.out / RESULTS,
        {
            "model": arguments.model,
            "fingerprint": before,
            "training": training | {"images_per_second": images_per_second},
            "validation": {"data": validation.name, "images": len(validation)},
            "runs": results,
            "seconds": seconds,
            **provenance,
        },
    )
    print(f"\nplan.safetensors, results.json and gates.png are in {arguments.out} after {math.ceil(seconds)} s")


if __name__ == "__main__":
    cli.run(main, Arguments, many_processes=True)
