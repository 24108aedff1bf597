"""Measures the time of a dense forward pass, beside transformers' detector in other runtimes in the same run."""

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from torch_runtimes import NAMES, runtime_forwards, runtime_versions

from detr_jax.commands import cli
from detr_jax.errors import InputError
from detr_jax.files import refuse_existing, write_json
from detr_jax.models import PRESETS, DetrConfig, preset_config
from detr_jax.models.registry import ARCHITECTURES, architecture_of
from detr_jax.search.timing import interleaved_times

Forward = Callable[[], Any]


@dataclass(frozen=True)
class Arguments:
    """Measures the dense forward pass of a randomly initialised detector, beside transformers' in other runtimes.

    These are torch, torch.compile, onnxruntime and OpenVINO. All take turns, so that whatever else the machine does
    slows all of them; medians are compared. What is not installed, or cannot do the same, is left out with its reason.

    For example `python scripts/benchmarks/dense.py --preset detr-r101 --repeats 5 --out runs/benchmark-r101.json`.
    """

    preset: Literal[tuple(PRESETS)] = "detr-r50"
    """Architecture."""
    height: int = 800
    """Of the images, in pixels."""
    width: int = 1066
    """Of the images, in pixels."""
    batch_size: int = 1
    """Images in a forward pass."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation."""
    repeats: int = 10
    """Measured turns, after two that warm up."""
    out: Path = Path("runs/benchmark.json")
    """JSON file for the times, the ratio, the memory, the arguments and the versions."""
    overwrite: bool = False
    """Replace the output file if it exists."""


def our_forwards(config: DetrConfig, arguments: Arguments) -> tuple[dict[str, Forward], dict[str, int]]:
    """The forward passes of our model and its parts, and the bytes the whole one needs."""
    dtype = jnp.dtype(arguments.dtype)
    _, module = ARCHITECTURES[architecture_of(config)]
    graph, state = nnx.split(module(config, dtype=dtype, rngs=nnx.Rngs(0)))
    images = jax.random.normal(jax.random.key(0), (arguments.batch_size, arguments.height, arguments.width, 3))

    def backbone(state, images):
        return nnx.merge(graph, state).backbone(images.astype(dtype))

    def embed(state, images):
        mask = jnp.ones(images.shape[:3], bool)
        return nnx.merge(graph, state).embed(images, mask, mask.any((1, 2)))

    def transformer(state, features):
        return nnx.merge(graph, state).transform(features)

    whole = jax.jit(lambda state, images: nnx.merge(graph, state)(images)).lower(state, images).compile()
    backbone, transformer = jax.jit(backbone), jax.jit(transformer)
    features = jax.jit(embed)(state, images)
    memory = whole.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
    }
    return {
        "ours": lambda: jax.block_until_ready(whole(state, images)),
        "ours, backbone": lambda: jax.block_until_ready(backbone(state, images)),
        "ours, transformer": lambda: jax.block_until_ready(transformer(state, features)),
    }, sizes | {"peak": sum(sizes.values())}


def table(medians: dict[str, float], seconds: dict[str, list[float]], sizes: dict[str, int]) -> str:
    """Median, fastest and slowest turn of each, one a line; then the ratios and the memory."""
    rows = [f"{'seconds':<20}{'median':>9}{'min':>9}{'max':>9}"]
    rows += [f"{name:<20}{medians[name]:9.3f}{min(s):9.3f}{max(s):9.3f}" for name, s in seconds.items()]
    rows += [f"{name:<24}{ratio:5.2f}" for name, ratio in ratios(medians).items()]
    return "\n".join([*rows, f"{'peak memory of ours':<20}{sizes['peak'] / 2**20:9.0f} MiB"])


def ratios(medians: dict[str, float]) -> dict[str, float]:
    """Our medians over those of the runtimes that were measured."""
    pairs = [*(("ours", name) for name in NAMES), ("ours, backbone", "torch, backbone")]
    return {f"{ours} / {theirs}": medians[ours] / medians[theirs] for ours, theirs in pairs if theirs in medians}


def benchmark(arguments: Arguments) -> None:
    if arguments.repeats < 1:
        raise InputError(f"--repeats must be at least 1, got {arguments.repeats}")
    refuse_existing(arguments.out, arguments.overwrite)
    config = preset_config(arguments.preset)
    forwards, sizes = our_forwards(config, arguments)
    shape = (arguments.batch_size, arguments.height, arguments.width)
    theirs, left_out = runtime_forwards(config, shape, arguments.dtype)
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}")

    seconds = interleaved_times(forwards | theirs, arguments.repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    report = {
        "seconds": seconds,
        "medians": medians,
        "ratios": ratios(medians),
        "bytes": sizes,
        "left_out": left_out,
        "cpus": os.cpu_count(),
    } | cli.provenance(arguments)
    report["versions"] |= runtime_versions()
    write_json(arguments.out, report)
    print(table(medians, seconds, sizes))


if __name__ == "__main__":
    cli.run(benchmark, Arguments)
