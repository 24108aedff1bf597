"""`detr-jax export`: a detector as a graph that runs without this library."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import tyro

import detr_jax
from detr_jax.commands.options import Implementation
from detr_jax.errors import InputError
from detr_jax.files import refuse_existing


@dataclass(frozen=True)
class Arguments:
    """Writes a detector with preprocessing and post-processing as StableHLO or ONNX, and a description of it as JSON.

    For example `detr-jax export detr-tiny --plan detr-tiny --size 128 128 --out detr-tiny.stablehlo`. ONNX needs the
    extra `onnx`. See docs/serving.md.
    """

    model: tyro.conf.Positional[str]
    """Name of a detector, hub id, or path of a checkpoint."""
    size: tuple[int, int]
    """Height and width in pixels that images are padded to; they are resized before."""
    out: Path
    """File to write, .stablehlo or .onnx; its description is beside it, with .json appended."""
    preset: str | None = None
    """Architecture of a checkpoint that does not say which it is, e.g. detr-r50."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the detector's computation; gates are float32."""
    plan: str | None = None
    """Plan of the detector: a file, a folder, a hub id, or an embedded detector."""
    implementation: Implementation = "plan"
    """Computation of FFNs with a plan: plan is the plan's own way; masked computes everything and ignores what is not
    selected; the others leave it out."""
    batch: int | None = None
    """Number of images; default any."""
    format: Literal["stablehlo", "onnx"] | None = None
    """Of the file; default by its suffix."""
    platforms: tuple[Literal["cpu", "cuda", "tpu"], ...] | None = None
    """Platforms of StableHLO; default all of them."""
    overwrite: bool = False
    """Replace files that exist."""


def main(arguments: Arguments) -> None:
    """Runs the command."""
    if arguments.plan is None and arguments.implementation != "plan":
        raise InputError(f"--implementation {arguments.implementation} needs a --plan: dense FFNs leave nothing out")
    for path in (arguments.out, Path(f"{arguments.out}.json")):
        refuse_existing(path, arguments.overwrite)
    detector = detr_jax.load(arguments.model, arguments.preset, jnp.dtype(arguments.dtype))
    implementation = None if arguments.implementation == "plan" else arguments.implementation
    plan = arguments.plan
    detr_jax.export(
        detector if plan is None else detr_jax.load_sparse(detector, plan, implementation=implementation),
        arguments.out,
        size=arguments.size,
        batch=arguments.batch,
        format=arguments.format,
        platforms=arguments.platforms,
        overwrite=arguments.overwrite,
    )
    print(
        f"wrote {arguments.out}, {arguments.out.stat().st_size / 1e6:.1f} MB, and its description {arguments.out}.json"
    )
