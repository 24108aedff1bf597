"""Times every implementation of the sparse FFN beside the dense one, after checking that they compute the same."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from detr_jax import cli
from detr_jax.evaluation.report import table
from detr_jax.evaluation.timing import take_turns
from detr_jax.files import refuse_existing, write_json
from detr_jax.kernels import FFNWeights, block_sparse_ffn, ffn, tiles_needing
from detr_jax.kernels.dispatch import PREFERRED, Problem, refusal, tuning_path
from detr_jax.kernels.reference import block_sparse_ffn as definition

TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}
"""Norm of the difference to the definition over the norm of the outputs."""
CEILING_SIDE = 4096
"""Of the square matrices whose product gives the device's ceiling."""


@dataclass(frozen=True)
class Arguments:
    """Times the sparse FFN: XLA's dense one beside every implementation that runs on this device.

    Values are checked first. All contestants of a row take turns within one run, and what counts is the ratio of their
    medians; absolute times count on a GPU or TPU only. The decision is part of what is timed: a linear gate on the mean
    input of a tile says which blocks it needs, or one on every token, whose decisions a tile unites; so are the lists
    and the gather. Random inputs, whose tokens differ from each other by half of their variance.

    For example `python scripts/benchmark_kernels.py --tokens 1050 8400 --dtype bfloat16 --out runs/kernels.json`.
    """

    tokens: tuple[int, ...] = (1050,)
    """Tokens of the FFN's input; 1050 is one image of 800x1333 pixels in DETR's encoder."""
    densities: tuple[float, ...] = (0.05, 0.125, 0.25, 0.5, 0.75, 1.0)
    """Shares of the (tile, block) pairs that are computed."""
    tile_sizes: tuple[int, ...] = (0, 64, 16)
    """Tokens per tile; 0 is one set of blocks for all tokens."""
    gates: tuple[Literal["tile", "token"], ...] = ("tile", "token")
    """Whether a gate decides for a tile or for each token."""
    block_size: int = 64
    """Neurons per block."""
    d_model: int = 256
    """Features of the model."""
    hidden: int = 2048
    """Hidden neurons."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision."""
    repeats: int = 15
    """Measured turns, after two that warm up."""
    write_tuning: bool = False
    """Also write the break-even densities into the package's table for this kind of device."""
    out: Path = Path("runs/benchmark_kernels.json")
    """JSON file for the times, the ratios, the arguments and the versions."""
    overwrite: bool = False
    """Replace the output file if it exists."""


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        tokens: of the input.
        tile_size: tokens per tile.
        gate: whether a gate decides for tiles or tokens.
        asked: density.
        x: (tokens, d).
        needed: jittable, x -> (tiles, B) bool.
    """

    tokens: int
    tile_size: int
    gate: str
    asked: float
    x: jax.Array
    needed: Callable[[jax.Array], jax.Array]


def random_weights(arguments: Arguments) -> FFNWeights:
    """An FFN of the arguments' size."""
    d, features, dtype = arguments.d_model, arguments.hidden, jnp.dtype(arguments.dtype)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((features, d), (features,), (features, d), (d,))
    scales = (d**-0.5, 0.1, features**-0.5, 0.1)
    arrays = [scale * jax.random.normal(k, shape) for k, shape, scale in zip(keys, shapes, scales, strict=True)]
    return FFNWeights(*(array.astype(dtype) for array in arrays))


def cases(arguments: Arguments) -> Iterator[Case]:
    """All rows. Gates are random; their thresholds are quantiles of what they say, so that the density is as asked."""
    d, blocks = arguments.d_model, arguments.hidden // arguments.block_size
    kernel = jax.random.normal(jax.random.key(1), (d, blocks)) / np.sqrt(d)
    for tokens in arguments.tokens:
        common, own = (jax.random.normal(jax.random.key(k), shape) for k, shape in ((2, (d,)), (3, (tokens, d))))
        x = ((common + own) / np.sqrt(2)).astype(arguments.dtype)
        for size in arguments.tile_sizes:
            tile_size = size or tokens
            for gate in arguments.gates:
                for density in arguments.densities:
                    yield _case(x, kernel.astype(arguments.dtype), tile_size, gate, density)


def _case(x: jax.Array, kernel: jax.Array, tile_size: int, gate: str, density: float) -> Case:
    tokens, blocks = len(x), kernel.shape[1]
    count = -(-tokens // tile_size)

    def means(x):
        padded = jnp.pad(x, ((0, count * tile_size - tokens), (0, 0))).reshape(count, tile_size, -1)
        return padded.mean(1, dtype=jnp.float32).astype(x.dtype)

    def tile_scores(x):  # of each pair, the highest score that a token of the tile gives
        if gate == "tile":
            return means(x) @ kernel
        missing = ((0, count * tile_size - tokens), (0, 0))
        return jnp.pad(x @ kernel, missing, constant_values=-jnp.inf).reshape(count, tile_size, blocks).max(1)

    scores = np.sort(np.asarray(tile_scores(x), np.float32), axis=None)[::-1]
    threshold = scores[round(density * scores.size) - 1] if round(density * scores.size) else np.inf

    def needed(x):
        if gate == "tile":
            return means(x) @ kernel >= threshold
        return tiles_needing(x @ kernel >= threshold, tile_size, blocks)

    return Case(tokens, tile_size, gate, density, x, needed)


def measure(case: Case, weights: FFNWeights, names: tuple[str, ...], arguments: Arguments) -> dict[str, Any]:
    """One row: checks every implementation, then times them beside the dense FFN."""
    needed = jax.jit(case.needed)(case.x)
    expected = np.asarray(jax.jit(definition, static_argnums=3)(case.x, weights, needed, case.tile_size), np.float32)
    contestants = {"dense": jax.jit(lambda x, weights: ffn(x, *weights))}
    for name in (*names, "auto"):
        implementation = None if name == "auto" else name

        def run(x, weights, implementation=implementation):
            return block_sparse_ffn(x, weights, case.needed(x), case.tile_size, implementation=implementation)

        contestants[name] = jax.jit(run)
    errors = {}
    for name in (*names, "auto"):
        outputs = np.asarray(contestants[name](case.x, weights), np.float32)
        error = float(np.linalg.norm(outputs - expected) / np.linalg.norm(expected))
        if not error <= TOLERANCES[arguments.dtype]:
            raise AssertionError(
                f"{name} is wrong by {error:.2e} for {case.tokens} tokens in tiles of {case.tile_size}"
            )
        errors[name] = error
    calls = {name: partial(_wait, run, case.x, weights) for name, run in contestants.items()}
    seconds = take_turns(calls, arguments.repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    density = float(needed.mean())
    products = 4 * case.tokens * arguments.d_model * arguments.hidden
    return {
        "tokens": case.tokens,
        "tile_size": case.tile_size,
        "gate": case.gate,
        "density": density,
        "seconds": seconds,
        "medians": medians,
        "faster_than_dense": {name: medians["dense"] / medians[name] for name in (*names, "auto")},
        "flops_per_second": {
            name: products * (1 if name == "dense" else density) / median for name, median in medians.items()
        },
        "errors": errors,
    }


def _wait(run: Callable[..., jax.Array], *operands: Any) -> None:
    jax.block_until_ready(run(*operands))


def break_even(rows: list[dict[str, Any]], name: str) -> float:
    """The highest density that was measured, up to which an implementation is nowhere slower than dense."""
    slower = [row["density"] for row in rows if row["faster_than_dense"][name] < 1]
    # Tiles meet the densities that are asked for only about.
    limit = min(slower, default=2.0) - 0.02
    return max([row["density"] for row in rows if row["density"] < limit], default=0.0)


def ceiling(dtype: str, repeats: int) -> float:
    """Floating-point operations per second of one large product on this device."""
    square = jax.random.normal(jax.random.key(0), (CEILING_SIDE, CEILING_SIDE)).astype(dtype)
    product = jax.jit(jnp.matmul)
    seconds = take_turns({"product": partial(_wait, product, square, square)}, min(repeats, 5))["product"]
    return 2 * CEILING_SIDE**3 / statistics.median(seconds)


def main(arguments: Arguments) -> None:
    refuse_existing(arguments.out, arguments.overwrite)
    for density in arguments.densities:
        if not 0 <= density <= 1:
            raise ValueError(f"densities must be from 0 to 1, not {density}")
    if arguments.hidden % arguments.block_size:
        raise ValueError(f"{arguments.hidden} hidden neurons cannot be divided into blocks of {arguments.block_size}")
    weights = random_weights(arguments)
    blocks = arguments.hidden // arguments.block_size
    names = []
    for name in PREFERRED.get(jax.default_backend(), ("xla",)):
        problem = Problem(weights.w_in.dtype, 64, arguments.d_model, arguments.hidden, blocks, None)
        reason = refusal(problem, name)
        print(f"{name}: {reason or 'measured'}")
        names += [] if reason else [name]

    rows = []
    todo = list(cases(arguments))
    for case in tqdm(todo, desc="benchmarking", unit="row"):
        rows.append(measure(case, weights, tuple(names), arguments))
    top = ceiling(arguments.dtype, arguments.repeats)
    results = {
        "rows": rows,
        "ceiling_flops_per_second": top,
        "break_even": {name: break_even(rows, name) for name in names},
        **cli.provenance(arguments),
    }
    write_json(arguments.out, results)
    if arguments.write_tuning:
        path = tuning_path(jax.devices()[0].device_kind)
        path.parent.mkdir(exist_ok=True)
        provenance = cli.provenance(arguments) | {"arguments": cli.settings(arguments)}
        write_json(path, {"break_even": results["break_even"], "measured": provenance})
        print(f"break-even densities are in {path}")

    header = ("tokens", "tile", "gate", "density", "dense ms", *(f"{n} x" for n in (*names, "auto")), "dense % of peak")
    lines = [
        (
            *(row["tokens"], row["tile_size"], row["gate"], row["density"], 1e3 * row["medians"]["dense"]),
            *(row["faster_than_dense"][name] for name in (*names, "auto")),
            f"{100 * row['flops_per_second']['dense'] / top:.0f}",
        )
        for row in rows
    ]
    print(
        f"\nTimes as fast as XLA's dense FFN, {arguments.dtype}, blocks of {arguments.block_size} neurons, "
        f"{jax.devices()[0].device_kind}; the gate, the lists and the gather included"
    )
    print(table(header, lines))
    print(f"break-even density: {', '.join(f'{n} {d:.2f}' for n, d in results['break_even'].items())}")


if __name__ == "__main__":
    cli.run(main, Arguments)
