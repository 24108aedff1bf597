"""Times narrow experts beside the dense FFN, after checking that they compute what is defined."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from device_time import Contestants, times
from ffn_baselines import FUSED, error_of, fused_dense, random_weights
from random_gates import random_inputs
from tqdm import tqdm

from detr_jax.commands import cli
from detr_jax.errors import InputError, require_counts
from detr_jax.files import refuse_existing, write_json
from detr_jax.kernels import Experts, FFNWeights, ffn, routed_ffn
from detr_jax.kernels.backend import FFNShape
from detr_jax.kernels.dispatch import BACKENDS
from detr_jax.kernels.experts import routed_ffn as definition
from detr_jax.kernels.routed import dispatch_routed
from detr_jax.methods.expert_fitting import WIDTHS
from detr_jax.viz.tables import table


@dataclass(frozen=True)
class Arguments:
    """Times narrow experts: XLA's dense FFN beside the implementation that this device prefers.

    Widths of experts span a factor of 16 about their mean and tokens go to them by a random router, which is part of
    the time, as is the grouping of tokens; "operation" is without the router. All contestants of a row take turns, and
    what counts is the ratio of their medians. GPUs are timed by CUPTI's records of their kernels, everything else by
    the host's clock.

    For example `python scripts/benchmarks/routed_kernels.py --experts 16 64 --densities 0.04`.
    """

    tokens: tuple[int, ...] = (1050, 4200, 22223)
    """Tokens of the FFN's input; 1050 is one image of 800x1333 pixels in DETR's encoder, 22223 one in Deformable
    DETR's."""
    experts: tuple[int, ...] = (16, 32)
    """Numbers of experts."""
    densities: tuple[float, ...] = (0.06,)
    """Mean over tokens of the neurons that they get, as a share of all."""
    d_model: int = 256
    """Features of the model."""
    hidden: int = 2048
    """Hidden neurons."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision."""
    implementation: str | None = None
    """Implementation of the experts; default the fastest on this device."""
    repeats: int = 15
    """Measured turns, after two that warm up."""
    out: Path = Path("runs/benchmark_routed.json")
    """JSON file for the times, the ratios, the arguments and the versions."""
    overwrite: bool = False
    """Replace the output file if it exists."""


def check(arguments: Arguments) -> None:
    """Raises an InputError if something cannot be measured."""
    require_counts(arguments, "d_model", "hidden", "repeats")
    if not (arguments.tokens and arguments.experts and arguments.densities):
        raise InputError("--tokens, --experts and --densities need at least one value each")
    if min(*arguments.tokens, *arguments.experts) < 1:
        raise InputError("--tokens and --experts must be at least 1")
    if not all(0 < density <= 1 for density in arguments.densities):
        raise InputError(f"densities must be above 0 and at most 1, not {arguments.densities}")


def random_router(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """A linear router (d, C), (C,) that sends unequal shares of the tokens to the experts."""
    keys = jax.random.split(jax.random.key(4), 2)
    kernel = jax.random.normal(keys[0], (x.shape[1], count)) / np.sqrt(x.shape[1])
    return kernel, jax.random.normal(keys[1], (count,)) / 2


def assign(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """(T,) int32, the expert of each token, decided in float32."""
    return (jnp.matmul(x.astype(jnp.float32), kernel) + bias).argmax(-1).astype(jnp.int32)


def cut_experts(weights: FFNWeights, shares: np.ndarray, density: float) -> tuple[Experts, np.ndarray]:
    """Experts with random neurons of an FFN, and their places in an order by width.

    Args:
        weights: of the FFN.
        shares: (C,) of the tokens that each gets.
        density: mean over tokens of the neurons, as a share of all; met about, because widths are from a grid.
    """
    features, rng = len(weights.w_in), np.random.default_rng(0)
    wanted = rng.permutation(np.geomspace(0.25, 4, len(shares)))
    wanted *= density * features / (shares @ wanted)
    widths = np.minimum(WIDTHS[np.abs(WIDTHS - wanted[:, None]).argmin(1)], features)
    order = np.argsort(widths, kind="stable")
    stacks = [
        jnp.stack([jnp.asarray(rng.choice(features, width, replace=False)) for _ in range((widths == width).sum())])
        for width in np.unique(widths)
    ]
    rows = [tuple(array[stack] for stack in stacks) for array in weights[:3]]
    return Experts(*rows, jnp.broadcast_to(weights.b_out, (len(shares), len(weights.b_out)))), order


def contestants(
    x: jax.Array, weights: FFNWeights, experts: Experts, router: tuple[jax.Array, jax.Array], implementation: str | None
) -> Contestants:
    """What takes turns; compiled when first called."""

    def routed(x, experts, kernel, bias):
        return routed_ffn(x, experts, assign(x, kernel, bias), implementation=implementation)

    def operation(x, experts, assignment):
        return routed_ffn(x, experts, assignment, implementation=implementation)

    found: Contestants = {
        "dense": (jax.jit(lambda x, weights: ffn(x, *weights)), (x, weights)),
        "experts": (jax.jit(routed), (x, experts, *router)),
        "operation": (jax.jit(operation), (x, experts, jax.jit(assign)(x, *router))),
    }
    hopper = next(backend for backend in BACKENDS if backend.name == "mosaic_gpu")
    if hopper.unsupported_reason(FFNShape(x.dtype, 64, x.shape[1], len(weights.w_in), 64, 1)) is None:
        found[FUSED] = (jax.jit(fused_dense), (x, weights))
    return found


def measure(arguments: Arguments, tokens: int, count: int, density: float) -> dict[str, Any]:
    """A row: checks what is timed on what it is timed with, then times it."""
    weights = random_weights(arguments.d_model, arguments.hidden, arguments.dtype)
    x = random_inputs(tokens, arguments.d_model, None).astype(arguments.dtype)
    kernel, bias = random_router(x, count)
    shares = np.bincount(np.asarray(assign(x, kernel, bias)), minlength=count) / tokens
    experts, order = cut_experts(weights, shares, density)
    router, shares = (kernel[:, order], bias[order]), shares[order]
    dispatch = dispatch_routed(x, experts.widths, arguments.implementation)
    rivals = contestants(x, weights, experts, router, arguments.implementation)

    started = time.perf_counter()
    run, operands = rivals["experts"]
    ours = jax.block_until_ready(run(*operands))
    compiled = time.perf_counter() - started
    error = error_of("experts", ours, precise(x, experts, assign(x, *router)), f"for {tokens} tokens, {count} experts")
    measured = times(rivals, arguments.repeats)
    medians = {name: statistics.median(seconds) for name, seconds in measured.seconds.items()}
    widths = np.array(experts.widths)
    rows = np.asarray(dispatch.backend.routed_rows(jnp.asarray((shares * tokens).round().astype(int)), tokens))
    return {
        "tokens": tokens,
        "experts": count,
        "asked": density,
        "density": float(shares @ widths / arguments.hidden),
        "executed": float(rows @ widths / tokens / arguments.hidden),
        "widths": widths.tolist(),
        "implementation": dispatch.backend.name,
        "refused": dispatch.refused,
        "error": error,
        "seconds_to_first_result": compiled,
        "clock": measured.clock,
        "seconds": measured.seconds,
        "host_seconds": measured.host,
        "medians": medians,
        "faster_than_dense": {name: medians["dense"] / median for name, median in medians.items() if name != "dense"},
    }


def precise(x: jax.Array, experts: Experts, assignment: jax.Array) -> jax.Array:
    """The definition in float32, whatever the inputs' type."""
    define: Callable[..., jax.Array] = jax.jit(definition)
    with jax.default_matmul_precision("highest"):
        return define(*jax.tree.map(lambda array: array.astype(jnp.float32), (x, experts)), assignment)


def report(results: dict[str, Any]) -> str:
    """A table for people."""
    rows = results["rows"]
    names = list(rows[0]["faster_than_dense"])
    header = (
        "tokens",
        "experts",
        "density",
        "executed",
        "ran",
        "clock",
        "dense ms",
        *(f"{n} x" for n in names),
        "to first s",
    )
    lines = [
        (
            *(row["tokens"], row["experts"], row["density"], row["executed"], row["implementation"], row["clock"]),
            *(1e3 * row["medians"]["dense"], *(row["faster_than_dense"][name] for name in names)),
            row["seconds_to_first_result"],
        )
        for row in rows
    ]
    arguments = results["arguments"]
    return (
        f"\nTimes as fast as XLA's dense FFN of {arguments['hidden']} neurons and {arguments['d_model']} features, "
        f"{arguments['dtype']}, {results['device']}\n{table(header, lines)}\n"
        f"largest relative error: {max(row['error'] for row in rows):.1e}"
    )


def main(arguments: Arguments) -> None:
    refuse_existing(arguments.out, arguments.overwrite)
    check(arguments)
    todo = [(t, e, d) for t in arguments.tokens for e in arguments.experts for d in arguments.densities]
    rows = []
    # float32 means float32, on GPUs and TPUs too.
    with jax.default_matmul_precision("highest" if arguments.dtype == "float32" else "default"):
        for one in tqdm(todo, desc="benchmarking", unit="row"):
            rows.append(measure(arguments, *one))
    results = {"rows": rows} | cli.provenance(arguments)
    write_json(arguments.out, results)
    print(report(results))


if __name__ == "__main__":
    cli.run(main, Arguments)
