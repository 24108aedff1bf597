"""Says where the time of an evaluation or of gate training goes on this device."""

import contextlib
import dataclasses
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import tyro
from profile_stages import evaluation_stages, stage_table, training_stages

import detr_jax
from detr_jax.commands import cli
from detr_jax.commands.options import DataOptions, ExecutionOptions
from detr_jax.errors import InputError
from detr_jax.files import refuse_existing, write_json
from detr_jax.methods import MGS
from detr_jax.plan import load_plan


@dataclass(frozen=True)
class Arguments:
    """Times the stages of a run one by one, and the run, in which they overlap.

    For example `python scripts/benchmarks/stage_times.py --run training --model detr-r50 --coco coco --dtype bfloat16`.
    """

    run: Literal["evaluation", "training"] = "evaluation"
    """An evaluation, or gate training with MGS."""
    model: str = "detr-tiny"
    """Name of a detector or path of a checkpoint."""
    preset: str | None = None
    """Architecture of a checkpoint that does not say which it is, e.g. detr-r50."""
    plan: str | None = None
    """Plan of the detector: evaluate it sparse instead of dense."""
    computation: Annotated[ExecutionOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=ExecutionOptions)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the detector's computation."""
    data: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=DataOptions)
    images: int = 256
    """The first so many images of the split: val for an evaluation, train for training."""
    batch_size: int = 8
    """Images per batch."""
    repeats: int = 20
    """Measured turns of each stage; their median is shown."""
    trace: Path | None = None
    """Folder for a trace of the run by JAX's profiler, for XProf or Perfetto."""
    out: Path = Path("runs/profile.json")
    """JSON file for the times, the arguments and the versions."""
    overwrite: bool = False
    """Replace the output file if it exists."""


def profile(arguments: Arguments) -> None:
    refuse_existing(arguments.out, arguments.overwrite)
    if arguments.run == "training" and arguments.plan is not None:
        raise InputError("gates are trained on the dense detector: --plan is for --run evaluation")
    dataset = arguments.data.open("val" if arguments.run == "evaluation" else "train", arguments.images)
    model = detr_jax.load(arguments.model, preset=arguments.preset, dtype=jnp.dtype(arguments.dtype))
    selectors = {}
    if arguments.plan is not None:
        plan = load_plan(arguments.plan, model)
        model, selectors = model.with_permutations(plan.permutations), arguments.computation.of(plan.selectors)
    trace = contextlib.nullcontext if arguments.trace is None else partial(jax.profiler.trace, arguments.trace)
    common = (model, dataset, arguments.batch_size)
    if arguments.run == "evaluation":
        times = evaluation_stages(*common, selectors, arguments.repeats, trace)
    else:
        times = training_stages(*common, MGS.group_size, arguments.repeats, trace)

    batch, height, width = times.shape
    print(f"{arguments.run}, batches of {batch} images of {width}x{height}, {jax.devices()[0].device_kind}\n")
    print(stage_table(times))
    print(f"\n{batch / times.run:.1f} images a second")
    report = dataclasses.asdict(times) | {"busy": times.busy, "waiting": times.waiting}
    write_json(arguments.out, report | cli.provenance(arguments))


if __name__ == "__main__":
    cli.run(profile, Arguments)
