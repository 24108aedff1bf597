"""`detr-jax evaluate`: average precision on COCO's layout, on scenes, or output divergence on any photographs."""

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

import detr_jax
from detr_jax.commands import cli
from detr_jax.commands.options import DataOptions, ExecutionOptions, ModelOptions
from detr_jax.errors import InputError
from detr_jax.evaluation.coco_ap import shown
from detr_jax.evaluation.inspection import describe
from detr_jax.evaluation.padding import padding_effect
from detr_jax.files import refuse_existing, write_json
from detr_jax.mesh import is_first_process
from detr_jax.viz.tables import table

MANY_PROCESSES = True


@dataclass(frozen=True)
class Arguments(ModelOptions):
    """Measures a detector: COCO's twelve numbers, and the 95 % confidence interval of AP.

    With a plan also the densities, and the differences to the dense detector on the same images. For example
    `detr-jax evaluate --model detr-r50 --coco coco --out runs/detr-r50.json`.
    """

    plan: str | None = None
    """Plan of the detector, to evaluate it sparse, not dense: a file, a folder, a hub id, or an embedded detector."""
    computation: Annotated[ExecutionOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=ExecutionOptions)
    data: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=DataOptions)
    split: str = "val"
    """val or train; of scenes also test, of a coco: folder any other split, or all where it is not divided."""
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


def padding_table(report: dict[str, Any]) -> str:
    """A padding report for people."""
    rows = [[name, f"{c['max']:.2e}", f"{c['median']:.2e}"] for name, c in report["change"].items()]
    text = f"padding, first {report['images']} images: absolute change\n{table(('', 'max', 'median'), rows)}"
    if report["AP"] is None:
        return text
    low, high = (shown(bound, "+.4f") for bound in report["AP_difference_interval"])
    padded, exact = (shown(report["AP"][name], ".4f") for name in ("padded", "exact"))
    return f"{text}\nAP padded {padded}, exact {exact} [{low}, {high}]"


def main(arguments: Arguments) -> None:
    """Runs the command."""
    refuse_existing(arguments.out, arguments.overwrite)
    if arguments.plan is None and arguments.computation != ExecutionOptions():
        raise InputError(
            f"--implementation {arguments.computation.implementation} needs a --plan: dense FFNs leave nothing out"
        )
    padded = arguments.padding_report
    sizes = (arguments.images,) if padded is None else (arguments.images, padded)
    datasets = [arguments.data.open(arguments.split, images) for images in sizes]
    detector = arguments.load() if arguments.plan is None else arguments.load_sparse(arguments.plan)
    if isinstance(detector, detr_jax.SparseDETR):
        selectors = arguments.computation.of(detector.plan.selectors)
        detector = detector.with_plan(dataclasses.replace(detector.plan, selectors=selectors))
    data, *samples = arguments.data.matched(detector.labels, *datasets)

    started = time.perf_counter()
    scores = detr_jax.evaluate(detector, data, batch_size=arguments.batch_size, exact_shapes=arguments.exact_shapes)
    report = scores.to_json() | {"implementation": "dense", "seconds": time.perf_counter() - started}
    print(scores)
    if isinstance(detector, detr_jax.SparseDETR):
        size = detector.preprocessing.resized_size(np.median(data.image_sizes(), axis=0))
        executions = detector.execution_report(size, arguments.batch_size)
        rows = [(name, counts.density, scores.executed[name]) for name, counts in scores.counts.items()]
        print(f"\n{table(('FFN', 'kept', 'computed'), rows)}\n\n{describe(executions)}")
        report["implementation"] = arguments.computation.implementation
        report["execution"] = {name: dataclasses.asdict(execution) for name, execution in executions.items()}
    for sample in samples:
        report["padding"] = padding_effect(detector, sample, arguments.batch_size)
        print(f"\n{padding_table(report['padding'])}")
    if is_first_process():
        write_json(arguments.out, report | cli.provenance(arguments))
