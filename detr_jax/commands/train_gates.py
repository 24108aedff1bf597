"""Fits a method to every FFN of a frozen detector, MGS by default, and measures its cost in AP and its sparsity."""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from scipy.special import expit

from detr_jax.commands import cli
from detr_jax.commands.options import DataOptions, ExecutionOptions, ModelOptions
from detr_jax.commands.reports import REPORT, detect_samples, sample_sections, what_ran
from detr_jax.errors import InputError
from detr_jax.evaluation.coco_ap import shown
from detr_jax.evaluation.evaluate import DENSE, Scores, evaluate_selections
from detr_jax.mesh import is_first_process
from detr_jax.methods import PAPER_THRESHOLD, Experts, Method, Thresholded, TokenGates, named, restricted_to
from detr_jax.models import Selector
from detr_jax.plan import save_plan
from detr_jax.run_folder import RESULTS, finish_run
from detr_jax.sparse import SparseDETR
from detr_jax.sparsify import fit
from detr_jax.training.budgets import Density, GateTuning, MaxDivergence, Recall, Threshold
from detr_jax.training.fit import FitOptions, hold_out, in_log_odds
from detr_jax.training.gates import GateTraining
from detr_jax.training.token_gates import fit_token_gates, training_record, untrained_gates
from detr_jax.viz.experts import plot_experts
from detr_jax.viz.figures import plot_gates, save_figure
from detr_jax.viz.report import Picture, Section, write_page
from detr_jax.viz.tables import Table, gate_table

MANY_PROCESSES = True
SCENES_TRAINING_IMAGES = 4096
PLAN, GATES, EXPERTS = "plan.safetensors", "gates.png", "experts.png"
TOKENS = "token-gates"
"""Folder of checkpoints."""
CAPTIONS = {
    GATES: "What is skipped in each FFN, which of the active groups are computed, and what that costs.",
    EXPERTS: "Each FFN's experts by width, and the width of every token's expert in the first image.",
}
INTERVALS = "AP has 95 % intervals by resampling images, and so has its difference to dense, paired."
NO_AP = "The validation images have no annotations, so that there is no AP."


@dataclass(frozen=True)
class Split:
    """Numbers of images."""

    train: int | None = None
    """To train on; default 4096 scenes, or all training images of other data that are not held out."""
    statistics: int = 256
    """Of those, for the neuron order by co-activation and for statistics."""
    calib: int = 128
    """Held-out training images for the thresholds."""
    val: int | None = None
    """To evaluate; default all validation images."""


@dataclass(frozen=True)
class Arguments(ModelOptions):
    """Fits a method to every FFN of a frozen detector, MGS's gates by default, and measures AP and sparsity.

    Without options: detr-tiny on generated scenes. On COCO, for example:
    `python scripts/train_gates.py --model detr-r50 --coco coco --batch-size 2 --out runs/gates-r50`.
    Writes plan.safetensors, results.json, gates.png and report.html into the output folder; report.html has the tables,
    the figures and sample images in one file. `detr_jax.sparsify` makes the same plan.
    """

    data: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=DataOptions)
    split: Split = field(default_factory=Split)
    method: str = "mgs"
    """Name in `detr_jax.methods.METHODS`."""
    options: tuple[str, ...] = ()
    """Options of the method itself, as NAME=VALUE: experts=64 ranking=obs for experts, rank=8 for sketch."""
    recipe: Literal["default", "paper"] = "default"
    """default: groups by co-activation, and a threshold for each layer; paper: the detector's own groups, and one
    threshold for all."""
    neuron_order: Literal["own", "coactivation", "kmeans"] | None = None
    """Order of the hidden neurons, which decides what a group is: the detector's own, those together that are active
    for the same tokens of training images, or those together that have similar input weights; default: the recipe's."""
    training: Annotated[GateTraining, tyro.conf.OmitArgPrefixes] = field(default_factory=GateTraining)
    threshold: float = PAPER_THRESHOLD
    """Uniform threshold that is reported beside the calibrated ones; of gates a probability."""
    recall: float = 0.99
    """Share of the active groups that each gate must find at its calibrated threshold."""
    density: float | None = None
    """Also meet this mean density over the FFNs, to which gates are trained on, all in effect; the plan is this one."""
    max_divergence: float | None = None
    """Also find the least mean density at which the detector's outputs diverge by this much, see
    `detr_jax.models.detr.outputs`, to which gates are trained on, all in effect; the plan is this one."""
    tuning: GateTuning = field(default_factory=GateTuning)
    keep_tokens: tuple[float, ...] = ()
    """Also train token gates: shares of the image tokens that the encoder's layers update, one for all layers or one
    for each. The plan has both; see `detr_jax.gate_tokens`."""
    computation: Annotated[ExecutionOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=ExecutionOptions)
    per_layer: bool = False
    """Also measure AP with each FFN alone gated at the uniform threshold."""
    out: Path = Path("runs/train_gates")
    """Folder for the results."""
    resume: bool = False
    """Resume an interrupted run in the output folder."""
    overwrite: bool = False
    """Delete an earlier run in the output folder."""


def budgets_of(method: Method, arguments: Arguments) -> dict[str, Any]:
    """The budgets to meet by title, that of the plan last."""
    for name in ("threshold", "recall"):
        if not 0 <= getattr(arguments, name) <= 1:
            raise InputError(f"--{name} must be between 0 and 1, not {getattr(arguments, name)}")
    if arguments.density is not None and arguments.max_divergence is not None:
        raise InputError("--density and --max-divergence are different budgets; choose one")
    if method.tuned_by == "nothing":
        return {f"all by {method.name}": None}
    budgets: list[Any] = []
    if in_log_odds(method):
        budgets.append(Threshold(arguments.threshold))
    if arguments.recipe == "default" and method.tuned_by == "threshold" and method.decides != "channel":
        budgets.append(Recall(arguments.recall))
    if arguments.density is not None:
        budgets.append(Density(arguments.density))
    if arguments.max_divergence is not None:
        budgets.append(MaxDivergence(arguments.max_divergence))
    if not budgets:
        raise InputError(f"{method.name} needs a --density or a --max-divergence")
    gated = "gated" if in_log_odds(method) else f"by {method.name}"
    return {f"all {gated}, {budget.title}": budget for budget in budgets}


def with_options(method: Method, options: Sequence[str]) -> Method:
    """A method with options given as NAME=VALUE; an InputError if it has no such option or it cannot have the value."""
    for option in options:
        name, _, value = option.partition("=")
        known = {field.name: type(getattr(method, field.name)) for field in dataclasses.fields(method)}
        if name not in known:
            raise InputError(f"{method.name} has no option {name!r}; it has {', '.join(known)}")
        try:
            method = dataclasses.replace(method, **{name: known[name](value)})
        except ValueError as error:
            raise InputError(f"{option!r} is no value of an option of {method.name}: {error}") from error
    return method


def thresholds_of(method: Method, selectors: Mapping[str, Selector]) -> dict[str, float | None]:
    """The threshold of every FFN, of gates as a probability; None without one."""
    found = {}
    for name, selector in selectors.items():
        threshold = selector.threshold if isinstance(selector, Thresholded) else None
        found[name] = None if threshold is None else float(expit(threshold) if in_log_odds(method) else threshold)
    return found


def summary(scores: Mapping[str, Scores]) -> Table:
    """A row for each way of running the detector."""
    rows: list[list[str | float]] = []
    for title, one in scores.items():
        interval = "-" if one.interval is None else "[{:.3f}, {:.3f}]".format(*one.interval)
        difference = ""
        if one.difference is not None and one.difference_interval is not None:
            difference = "{:+.3f} [{:+.3f}, {:+.3f}]".format(one.difference, *one.difference_interval)
        rows.append([title, shown(one.ap), interval, difference, shown(one.divergence, ".2e"), one.group_sparsity])
    header = ("FFNs", "AP", "interval", "minus dense (paired)", "output divergence", "mean group sparsity")
    return Table(header, rows)


def main(arguments: Arguments) -> None:
    """Runs the command."""
    started = time.perf_counter()
    model = arguments.load()
    training, split = arguments.training, arguments.split
    method = with_options(training.method(type(named(arguments.method))), arguments.options)
    budgets = budgets_of(method, arguments)
    order = arguments.neuron_order or ("own" if arguments.recipe == "paper" else "coactivation")
    options = FitOptions(
        order, split.statistics, training.batch_size, training.checkpoint_steps, tuning=arguments.tuning
    )
    wanted = SCENES_TRAINING_IMAGES if split.train is None and arguments.data.generated else split.train
    data = arguments.data.open("train", None if wanted is None else wanted + split.calib)
    data, validation = arguments.data.matched(model.labels, data, arguments.data.open("val", split.val))
    tokens = TokenGates(arguments.keep_tokens, seed=training.seed) if arguments.keep_tokens else None
    if tokens is not None:
        untrained_gates(model, tokens)  # before hours of work

    fitted = fit(
        *(model, data, method, split.calib, options, arguments.out),
        budgets=list(budgets.values()),
        outputs=(GATES, EXPERTS, REPORT, TOKENS),
        more_settings={"token gates": None if tokens is None else dataclasses.asdict(tokens)},
        resume=arguments.resume,
        overwrite=arguments.overwrite,
    )
    plans = {title: fitted.plan(budget) for title, budget in budgets.items()}
    if tokens is not None:
        fitted_on, _ = hold_out(data, split.calib)
        gated = fit_token_gates(model, fitted_on, tokens, training.batch_size, arguments.out / TOKENS)
        title, plan = list(plans.items())[-1]
        both: dict[str, Any] = dict(plan.selectors) | dict.fromkeys(model.token_parts, gated)
        shares = ", ".join(f"{100 * share:g} %" for share in tokens.keep)
        plans[f"{title}, {shares} of the tokens"] = dataclasses.replace(
            plan, selectors=both, training=plan.training | training_record(tokens, fitted_on)
        )
    selections = {title: plan.selectors for title, plan in plans.items()}
    if arguments.per_layer:
        uniform = next(iter(selections.values()))
        selections |= {
            f"{name} alone, threshold {arguments.threshold:g}": restricted_to(uniform, [name]) for name in uniform
        }
    computed = {title: arguments.computation.of(selectors) for title, selectors in selections.items()}
    scores = evaluate_selections(
        fitted.permuted, validation, {DENSE: {}} | computed, training.batch_size, group_size=fitted.group_size
    )
    title, plan = list(plans.items())[-1]
    samples = detect_samples(
        fitted.permuted, validation, {DENSE: {}, title: computed[title]}, training.batch_size, fitted.group_size
    )
    fitted.check_frozen()
    if not is_first_process():
        return

    thresholds = {title: thresholds_of(method, selectors) for title, selectors in selections.items()}
    tables = {title: gate_table(scores[title].counts, thresholds[title]) for title in plans}
    for label, table in tables.items():
        print(f"\n{label}\n{table}")
    evaluated = f"{len(validation)} images of {validation.name}"
    accuracy = summary(scores)
    print(f"\n{evaluated}, 95 % intervals over images\n{accuracy}")

    implementation = arguments.computation.implementation
    plan = scores[title].record(plan, None if implementation == "plan" else implementation)
    save_plan(plan, arguments.out / PLAN, overwrite=True)
    sparse = SparseDETR.of_checked(model, plan)
    about = f"{method.name} on {arguments.model}, {evaluated}"
    groups = f"groups of {fitted.group_size}" + (f" by {order}" if fitted.permutations else "")
    figures = {GATES: plot_gates(f"{about}, {groups}", scores[DENSE], {title: scores[title] for title in plans})}
    if isinstance(method, Experts):
        figures[EXPERTS] = plot_experts(sparse, validation[0].image)
    for name, figure in figures.items():
        save_figure(figure, arguments.out / name)
    images = sample_sections(sparse, validation, samples[DENSE], samples[title], title)

    runs = {label: one.to_json() for label, one in scores.items()}
    for label, run in runs.items():
        for name, ffn in run["ffns"].items():
            ffn["threshold"] = thresholds.get(label, {}).get(name)
    results = {
        "model": arguments.model,
        "fingerprint": plan.fingerprint,
        "training": plan.training | {"images_per_second": fitted.images_per_second},
        "validation": {"data": validation.name, "images": len(validation)},
        "runs": runs,
        "seconds": time.perf_counter() - started,
        **cli.provenance(arguments),
    }
    facts = {
        "method": f"{method.name}, {groups}",
        "plan": title,
        "training images": f"{len(data)} of {data.name}, the last {split.calib} held out for thresholds",
        "validation images": evaluated,
    }
    about_ap = INTERVALS if validation.has_annotations else NO_AP
    sections = [
        what_ran(results, facts),
        Section("Accuracy and sparsity", [f"{PLAN} is “{title}”. {about_ap}", accuracy]),
        Section("Figures", [Picture.read(arguments.out / name, CAPTIONS[name]) for name in figures]),
        Section("FFNs", [part for named in tables.items() for part in named]),
    ]
    write_page(arguments.out / REPORT, about, [*sections, *images])
    finish_run(arguments.out, results)
    written = ", ".join((PLAN, RESULTS, *figures))
    print(f"\n{written} and {REPORT} are in {arguments.out} after {math.ceil(results['seconds'])} s")
