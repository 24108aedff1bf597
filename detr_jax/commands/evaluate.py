"""Measures a detector's average precision on COCO or on generated scenes."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import tyro

import detr_jax
from detr_jax.calibration.permutation import permute_neurons
from detr_jax.commands import cli
from detr_jax.commands.execution_options import ExecutionOptions
from detr_jax.data.registry import open_dataset
from detr_jax.errors import InputError
from detr_jax.evaluation.coco_ap import CocoScores, bootstrap, confidence_interval, score, shown
from detr_jax.evaluation.padding import padding_effect
from detr_jax.evaluation.runs import detect_dataset
from detr_jax.files import refuse_existing, write_json
from detr_jax.mesh import is_first_process, replicate
from detr_jax.plan import load_plan

MANY_PROCESSES = True


@dataclass(frozen=True)
class Arguments:
    """Measures a detector's average precision: COCO's twelve numbers, and the 95 % confidence interval of AP.

    For example `python scripts/evaluate.py --model detr-r50 --coco coco --out runs/detr-r50.json`.
    """

    model: str = "detr-tiny"
    """Name of a detector or path of a checkpoint."""
    preset: str | None = None
    """Architecture of a checkpoint that does not say which it is, e.g. detr-r50."""
    plan: Path | None = None
    """Plan of the detector, as scripts/train_gates.py writes it: evaluate it sparse instead of dense."""
    computation: Annotated[ExecutionOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=ExecutionOptions)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation."""
    coco: Path | None = None
    """Folder with val2017/ and annotations/instances_val2017.json; without it, generated scenes are used."""
    split: str = "val"
    """val or train, or the full name of another split of the COCO folder."""
    images: int | None = None
    """Evaluate the first so many images only; default all."""
    batch_size: int = 8
    """Images per batch."""
    exact_shapes: bool = False
    """Compute images at their exact size instead of padding them to a few shapes; compiles for every size."""
    padding_report: int | None = None
    """Also report how padding changes the outputs for the first so many images."""
    out: Path = Path("runs/evaluate.json")
    """JSON file for the numbers, the arguments and the versions."""
    overwrite: bool = False
    """Replace the output file if it exists."""


def table(scores: CocoScores, interval: tuple[float, float]) -> str:
    """The twelve numbers, one a line, AP with its interval; a dash where no object defines one."""
    rows = [f"{name:<6} {value:6.3f}" if value >= 0 else f"{name:<6}      -" for name, value in scores.numbers.items()]
    rows[0] += f"  [{shown(interval[0])}, {shown(interval[1])}]"
    return "\n".join([*rows, f"images {len(scores.image_ids):6}"])


def padding_table(report: dict) -> str:
    """A padding report for people."""
    rows = [f"padding, first {report['images']} images: absolute change", f"{'':<8}{'max':>10}{'median':>10}"]
    rows += [f"{name:<8}{c['max']:10.2e}{c['median']:10.2e}" for name, c in report["change"].items()]
    low, high = report["AP_difference_interval"]
    rows.append(f"AP padded {report['AP']['padded']:.4f}, exact {report['AP']['exact']:.4f} [{low:+.4f}, {high:+.4f}]")
    return "\n".join(rows)


def warn_of_other_classes(labels: tuple[str, ...], categories: list[dict]) -> None:
    """A detector of other classes has an AP near 0, which should surprise nobody."""
    known = dict(enumerate(labels))
    if other := [c for c in categories if known.get(c["id"]) != c["name"]]:
        first = other[0]
        print(
            f"warning: {len(other)} of {len(categories)} categories are not the detector's classes; "
            f"{first['id']} is {first['name']!r} in the data and {known.get(first['id'])!r} for the detector",
            file=sys.stderr,
        )


def main(arguments: Arguments) -> None:
    refuse_existing(arguments.out, arguments.overwrite)
    if arguments.plan is None and arguments.computation != ExecutionOptions():
        raise InputError(
            f"--implementation {arguments.computation.implementation} needs a --plan: dense FFNs leave nothing out"
        )
    dataset = open_dataset(arguments.coco, arguments.split, arguments.images)
    sample = None
    if arguments.padding_report is not None:
        sample = open_dataset(arguments.coco, arguments.split, arguments.padding_report)
    model = detr_jax.load(arguments.model, preset=arguments.preset, dtype=jnp.dtype(arguments.dtype))
    selectors = {}
    if arguments.plan is not None:
        plan = load_plan(arguments.plan, model)
        model, selectors = permute_neurons(model, plan.orders), arguments.computation.of(plan.selectors)
    ground_truth = dataset.ground_truth()
    warn_of_other_classes(model.config.labels, ground_truth["categories"])

    started = time.perf_counter()
    # Images of their own size have no batch that devices could share.
    placed = model if arguments.exact_shapes else replicate(model)
    results = detect_dataset(placed, dataset, arguments.batch_size, selectors=selectors, exact=arguments.exact_shapes)
    seconds = time.perf_counter() - started
    scores = score(ground_truth, results, dataset.image_ids())
    interval = confidence_interval(bootstrap(scores))
    print(table(scores, interval))

    report = {
        "dataset": dataset.name,
        "images": len(dataset),
        "numbers": scores.numbers,
        "AP_interval": interval,
        "category_AP": scores.category_ap,
        "implementation": arguments.computation.implementation if selectors else "dense",
        "seconds": seconds,
    }
    if sample is not None:
        report["padding"] = padding_effect(model, sample, arguments.batch_size)
        print(padding_table(report["padding"]))
    if is_first_process():
        write_json(arguments.out, report | cli.provenance(arguments))
