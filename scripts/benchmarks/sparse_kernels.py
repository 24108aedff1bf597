"""Times every implementation of the sparse FFN beside the dense one, after checking that they compute the same."""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from deadline import Deadline
from device_time import peaks
from kernel_benchmark import Measurer, Setting
from kernel_report import break_even, report
from random_gates import RandomGate
from tqdm import tqdm

from detr_jax.commands import cli
from detr_jax.errors import InputError
from detr_jax.files import refuse_existing, write_json
from detr_jax.kernels.dispatch import tuning_path

LARGEST_CHECKED = 200
"""Tokens of the largest tile on which implementations are compared before anything is measured."""


@dataclass(frozen=True)
class Defaults:
    """What is measured on a kind of device where the command does not say."""

    tokens: tuple[int, ...]
    densities: tuple[float, ...]
    tile_sizes: tuple[int, ...]
    gates: tuple[str, ...]
    dtype: str
    minutes: float | None
    ceiling_side: int
    ceiling_bytes: int


CPU = Defaults(
    (1050,), (0.05, 0.125, 0.25, 0.5, 0.75, 1.0), (0, 64, 16), ("tile", "token"), "float32", None, 4096, 2**28
)
# What matters most comes first, in case the time does not suffice.
ACCELERATOR = Defaults(
    (33600, 8400, 1050, 134400),
    (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0),
    (64, 128),
    ("tile",),
    "bfloat16",
    7.5,
    8192,
    2**31,
)


@dataclass(frozen=True)
class Arguments:
    """Times the sparse FFN: XLA's dense one beside the implementation that this device prefers.

    Every implementation that can run here is compared with the definition first. All contestants of a row take turns
    within one run, and what counts is the ratio of their medians. GPUs are timed by CUPTI's records of their kernels,
    everything else by the host's clock. The decision is part of what is timed: a linear gate on the mean input of a
    tile says which blocks it needs, or one on every token, whose decisions a tile unites; so are the lists and the
    gather. Defaults that differ: one image in float32 on a CPU; 1 to 128 images in bfloat16, in 7.5 minutes, elsewhere.

    For example `python scripts/benchmarks/sparse_kernels.py --tokens 1050 8400 --dtype bfloat16`.
    """

    tokens: tuple[int, ...] | None = None
    """Tokens of the FFN's input; 1050 is one image of 800x1333 pixels in DETR's encoder."""
    densities: tuple[float, ...] | None = None
    """Shares of the pairs with a block that are needed."""
    density_of: Literal["tiles", "tokens"] = "tiles"
    """Whether those are pairs with tiles, or with tokens, which makes tiles denser."""
    tile_sizes: tuple[int, ...] | None = None
    """Tokens per tile; 0 is one set of blocks for all tokens."""
    gates: tuple[Literal["tile", "token"], ...] | None = None
    """Whether a gate decides for a tile or for each token."""
    correlations: tuple[float, ...] = ()
    """Correlations of what the gate says about neighbouring tokens, for inputs that are such a process; without any,
    inputs differ from each other by half of their variance, neighbours as much as others."""
    orders: tuple[Literal["given", "signature"], ...] = ("given",)
    """Whether tokens are computed in the order in which they come, or in one that brings those together that need the
    same blocks; ordering and undoing it are part of the time. With gates for tokens only."""
    block_size: int = 64
    """Neurons per block."""
    d_model: int = 256
    """Features of the model."""
    hidden: int = 2048
    """Hidden neurons."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision."""
    repeats: int = 15
    """Measured turns, after two that warm up."""
    minutes: float | None = None
    """Time for everything: rows that would not fit are left out and named, and the command ends in any case."""
    write_tuning: bool = False
    """Also write the break-even densities into the package's table for this kind of device."""
    out: Path = Path("runs/benchmark_kernels.json")
    """JSON file for the times, the ratios, the arguments and the versions."""
    overwrite: bool = False
    """Replace the output file if it exists."""


def settings(arguments: Arguments) -> Iterator[Setting]:
    """All of them, in the order of the arguments."""
    for tokens in arguments.tokens:
        for size in arguments.tile_sizes:
            for correlation in arguments.correlations or (None,):
                for decides in arguments.gates:
                    for order in arguments.orders:
                        yield Setting(tokens, correlation, RandomGate(size or tokens, decides, order == "signature"))


def defaults() -> Defaults:
    """Those of the default device."""
    return CPU if jax.default_backend() == "cpu" else ACCELERATOR


def resolved(arguments: Arguments) -> Arguments:
    """With the device's defaults where the command says nothing.

    Raises:
        ValueError: if arguments do not fit each other.
    """
    missing = [field.name for field in dataclasses.fields(arguments) if getattr(arguments, field.name) is None]
    arguments = dataclasses.replace(arguments, **{name: getattr(defaults(), name) for name in missing})
    for density in arguments.densities:
        if not 0 <= density <= 1:
            raise InputError(f"densities must be from 0 to 1, not {density}")
    for name in ("tokens", "densities", "tile_sizes", "gates", "orders"):
        if not getattr(arguments, name):
            raise InputError(f"--{name.replace('_', '-')} needs at least one value")
    if arguments.hidden % arguments.block_size:
        raise InputError(f"{arguments.hidden} hidden neurons cannot be divided into blocks of {arguments.block_size}")
    if "tile" in arguments.gates and (arguments.density_of == "tokens" or "signature" in arguments.orders):
        raise InputError("densities of tokens and an order of tokens need gates that decide for tokens: --gates token")
    return arguments


def measure(arguments: Arguments, measurer: Measurer, deadline: Deadline, found: dict[str, Any]) -> None:
    """Checks, then measures what there is time for; `found` always says how far that is."""
    todo = [(setting, measurer.rows(setting, arguments.densities)) for setting in settings(arguments)]
    found["left_out"] += [s.describe() | {"asked": density} for s, _ in todo for density in arguments.densities]
    found["errors"] = measurer.check(
        sorted({min(size, LARGEST_CHECKED) or LARGEST_CHECKED for size in arguments.tile_sizes})
    )
    sizes = (defaults().ceiling_side, defaults().ceiling_bytes, min(arguments.repeats, 5))
    found["ceilings"] = dataclasses.asdict(peaks(arguments.dtype, *sizes))
    longest = 0.0
    with tqdm(total=len(found["left_out"]), desc="benchmarking", unit="row") as progress:
        for _, rows in todo:
            for row in rows:
                if not deadline.leaves(2 * longest):
                    return
                started = time.monotonic()
                found["rows"].append(row())
                del found["left_out"][0]
                longest = max(longest, time.monotonic() - started)
                progress.update()


def merged(found: dict[str, list[dict]], path: Path, ffn: dict[str, Any]) -> dict[str, list[dict]]:
    """Break-even densities together with those that a file has of other FFNs, blocks and types."""
    before = json.loads(path.read_text(encoding="utf-8"))["break_even"] if path.is_file() else {}
    others = {name: [e for e in entries if ffn != {key: e.get(key) for key in ffn}] for name, entries in before.items()}
    return others | {name: others.get(name, []) + entries for name, entries in found.items()}


def main(arguments: Arguments) -> None:
    refuse_existing(arguments.out, arguments.overwrite)
    arguments = resolved(arguments)
    measurer = Measurer(
        arguments.d_model,
        arguments.hidden,
        arguments.block_size,
        arguments.dtype,
        arguments.repeats,
        arguments.density_of,
    )
    for name, reason in measurer.refusals.items():
        print(f"{name}: {reason or 'can run here'}")
    ffn = {key: getattr(arguments, key) for key in ("block_size", "d_model", "hidden", "dtype")}
    found: dict[str, Any] = {"errors": {}, "ceilings": None, "rows": [], "left_out": []}

    def tell() -> dict[str, Any]:
        name = measurer.implementation
        results = found | {"break_even": {name: break_even(found["rows"], name, ffn)}} | cli.provenance(arguments)
        write_json(arguments.out, results)
        print(report(results), flush=True)
        return results

    def on_timeout() -> None:
        print(f"error: not done after {arguments.minutes} minutes", file=sys.stderr)
        tell()

    deadline = Deadline(None if arguments.minutes is None else 60 * arguments.minutes, on_timeout)
    # float32 means float32, on GPUs and TPUs too.
    with jax.default_matmul_precision("highest" if arguments.dtype == "float32" else "default"):
        measure(arguments, measurer, deadline, found)
    deadline.cancel()
    results = tell()
    if arguments.write_tuning:
        path = tuning_path(jax.devices()[0].device_kind)
        provenance = cli.provenance(arguments) | {"arguments": cli.settings(arguments)}
        write_json(path, {"break_even": merged(results["break_even"], path, ffn), "measured": provenance})
        print(f"break-even densities are in {path}")


if __name__ == "__main__":
    cli.run(main, Arguments)
