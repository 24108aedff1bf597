"""Times the FFNs of a detector with the gates of a plan beside the dense ones, on the inputs that images give them."""

import statistics
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

import detr_jax
from detr_jax.commands import cli
from detr_jax.commands.options import DataOptions
from detr_jax.data.features import backbone_features
from detr_jax.errors import InputError
from detr_jax.files import refuse_existing, write_json
from detr_jax.kernels import Execution, FFNWeights, any_per_tile, signature_order
from detr_jax.methods import Executed, executed
from detr_jax.models import Selection, Selector
from detr_jax.models.ffn import FFNTrace, forward
from detr_jax.plan import load_plan
from detr_jax.search.timing import interleaved_times
from detr_jax.viz.tables import table


@dataclass(frozen=True)
class Arguments:
    """Times each FFN of a detector with its selector of a plan beside the dense FFN, on real inputs.

    The selector, the lists and the gather are part of the time; the contestants take turns, and what counts is the
    ratio of their medians.

    For example `python scripts/benchmarks/plan.py --plan runs/train_gates/plan.safetensors`.
    """

    plan: Path
    """Plan of the detector, as scripts/train_gates.py writes it."""
    model: str = "detr-tiny"
    """Name of a detector or path of a checkpoint."""
    preset: str | None = None
    """Architecture of a checkpoint that does not say which it is, e.g. detr-r50."""
    data: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=DataOptions)
    images: int = 16
    """Images of the batch; of a data set with several sizes the first batch holds fewer."""
    tile_sizes: tuple[int, ...] = (0, 16)
    """Tokens per tile; 0 is one set of blocks for each image."""
    block_sizes: tuple[int, ...] = (8, 32)
    """Neurons per block."""
    orders: tuple[Literal["given", "signature"], ...] = ("given",)
    """Whether tokens are computed in the order in which they come, or in one that brings those together that need the
    same groups; ordering and undoing it are part of the time."""
    implementation: str | None = None
    """Implementation of the sparse FFN; default what pays on this device."""
    repeats: int = 15
    """Measured turns, after two that warm up."""
    out: Path = Path("runs/benchmark_plan.json")
    """JSON file for the times, the ratios, the arguments and the versions."""
    overwrite: bool = False
    """Replace the output file if it exists."""


def measure(weights: FFNWeights, trace: FFNTrace, selector: Selector, arguments: Arguments) -> list[dict[str, Any]]:
    """One FFN at every size of tiles and blocks and in every order of its tokens."""
    x, tokens = trace.inputs, trace.tokens

    def run(weights, x, selector):
        return forward(weights, x, Selection() if selector is None else selector(weights, x, tokens))

    run = jax.jit(run)
    settings = {
        (tile_size, block_size, order): Executed(
            selector,
            Execution(
                tile_size or None, block_size, ordered=order == "signature", implementation=arguments.implementation
            ),
        )
        for tile_size in arguments.tile_sizes
        for block_size in arguments.block_sizes
        for order in arguments.orders
    }
    baselines = {"dense": None, "masked": selector} | settings
    calls = {name: partial(_wait, run, weights, x, chosen) for name, chosen in baselines.items()}
    seconds = interleaved_times(calls, arguments.repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    features = len(weights.w_in)
    active = selector(weights, x, tokens).per_token(tokens.shape, features) & tokens[..., None]
    order = signature_order(active, active.any(-1))[..., None]
    actives = {"given": active, "signature": jnp.take_along_axis(active, order, axis=1)}
    return [
        {
            "tile_size": tile_size,
            "block_size": block_size,
            "order": order,
            "group_density": float(active.sum() / (tokens.sum() * active.shape[-1])),
            "density": float(any_per_tile(actives[order], tile_size or x.shape[1], features // block_size).mean()),
            "seconds": {
                "dense": medians["dense"],
                "masked": medians["masked"],
                "sparse": medians[tile_size, block_size, order],
            },
            "faster_than_dense": medians["dense"] / medians[tile_size, block_size, order],
        }
        for tile_size, block_size, order in settings
    ]


def _wait(run, *operands) -> None:
    jax.block_until_ready(run(*operands))


def main(arguments: Arguments) -> None:
    refuse_existing(arguments.out, arguments.overwrite)
    model = detr_jax.load(arguments.model, preset=arguments.preset)
    plan = load_plan(arguments.plan, model)
    model = model.with_permutations(plan.permutations)
    for block_size in arguments.block_sizes:
        for spec in model.ffn_specs().values():
            if block_size < 1 or spec.hidden % block_size:
                raise InputError(f"{spec.hidden} hidden neurons cannot be divided into blocks of {block_size}")
    dataset = arguments.data.open("val", arguments.images)
    bare = executed(plan.selectors, None)  # they are executed in each of the ways that are asked for
    selectors = {name: selector for name, selector in bare.items() if name in model.ffn_specs()}
    (batch, *_) = backbone_features(model, dataset, arguments.images, "embedding images")
    traces, weights = jax.jit(type(model).traces)(model, batch.tokens, selectors), model.ffn_weights()
    rows = [
        {"ffn": name} | row
        for name, selector in tqdm(selectors.items(), desc="benchmarking", unit="FFN")
        for row in measure(weights[name], traces[name], selector, arguments)
    ]
    images, grids = int(batch.valid.sum()), " and ".join(f"{rows}x{columns}" for rows, columns in batch.grids)
    write_json(arguments.out, {"rows": rows, "data": dataset.name, "images": images, **cli.provenance(arguments)})
    header = ("FFN", "tokens", "tile", "order", "block", "groups", "tiles x blocks", "dense ms", "sparse ms", "faster")
    lines = [
        (
            *(
                row["ffn"],
                int(np.prod(traces[row["ffn"]].tokens.shape)),
                str(row["tile_size"] or "image"),
                row["order"],
            ),
            *(row["block_size"], row["group_density"], row["density"]),
            *(1e3 * row["seconds"]["dense"], 1e3 * row["seconds"]["sparse"], row["faster_than_dense"]),
        )
        for row in rows
    ]
    print(
        f"\nFFNs of {arguments.model} on the first batch: {images} images of {grids} tokens, "
        f"{jax.devices()[0].device_kind}, selector included"
    )
    print(table(header, lines))
    for (tile_size, block_size, order), some in _by_setting(rows).items():
        dense, sparse = (sum(row["seconds"][which] for row in some) for which in ("dense", "sparse"))
        ordered = ", ordered" if order == "signature" else ""
        print(f"all FFNs, {tile_size or 'image'} x {block_size}{ordered}: {dense / sparse:.2f} times as fast as dense")


def _by_setting(rows: list[dict[str, Any]]) -> dict[tuple[int, int, str], list[dict[str, Any]]]:
    by_setting: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        by_setting.setdefault((row["tile_size"], row["block_size"], row["order"]), []).append(row)
    return by_setting


if __name__ == "__main__":
    cli.run(main, Arguments)
