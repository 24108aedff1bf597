"""Density of FFNs from single tokens and neurons to tiles and blocks, for several orders of tokens and neurons."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import tyro
from common import check_options, embed
from ffn_study import image_batches, read_ffns
from tile_study import Measurement, Setting, TokenOrder, measure_settings, settings_of, token_counts
from tile_study_report import plot_neuron_orders, plot_where, study_markdown
from top_p import TopPPermutation, measure_top_p, top_p_permutation
from tqdm import tqdm

import detr_jax
from detr_jax.calibration.activations import measure_activations, require_active
from detr_jax.calibration.permutation import coactivation_permutation, kmeans_permutation
from detr_jax.commands import cli
from detr_jax.commands.options import DataOptions
from detr_jax.data.batches import CachedBatches
from detr_jax.errors import InputError
from detr_jax.files import refuse_existing, replacing, write_json
from detr_jax.methods.grouping import group_count
from detr_jax.models.base import HasFFNs
from detr_jax.viz.figures import save_figure

NEURON_ORDERS = ("own", "coactivation", "kmeans", "contribution", "top-p")


@dataclass(frozen=True)
class Arguments:
    """Measures how much sparsity is left in tiles of tokens times blocks of neurons, which is what hardware can skip.

    For a detector, or FFNs given as arrays with samples of their inputs: the density of active pairs, of the pairs that
    make up nearly all of a tile's contribution, and the output's error when every tile keeps the blocks that contribute
    most to it. Tiles are of every size in two orders of the tokens, blocks in several orders of the neurons.

    For example `python scripts/studies/tiles.py`, or `python scripts/studies/tiles.py --arrays ffns.npz`. Writes
    results.json, tables.md, where.png and orders.png into the output folder.
    """

    model: str = "detr-tiny"
    """Name of a detector or path of a checkpoint."""
    preset: str | None = None
    """Architecture of a checkpoint that does not say which it is, e.g. detr-r50."""
    data: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=DataOptions)
    arrays: Path | None = None
    """Instead of a detector: .npz file of FFNs, see scripts/studies/ffns.py. The first half of its images is for the
    orders, the other half is measured."""
    fit_images: int = 100
    """Training images for the orders of the neurons."""
    images: int = 100
    """Validation images to measure."""
    batch_size: int = 20
    """Images per batch."""
    tile_sizes: tuple[int, ...] = (1, 8, 16, 32, 64, 128)
    """Tokens per tile, beside whole images; what is no smaller than an image is left out."""
    order_tile_sizes: tuple[int, ...] = (16, 64)
    """The same, where orders of the neurons are compared."""
    block_sizes: tuple[int, ...] = (8, 32, 64, 128)
    """Neurons per block, beside single neurons."""
    shares: tuple[float, ...] = (0.5, 0.25, 0.125)
    """Of the blocks, that every tile keeps."""
    need_share: float = 0.99
    """Of what is contributed to a tile, the part that the neurons make up that it needs."""
    fit_tile_size: int = 16
    """Tokens per tile in which neurons are needed together, for the order by need."""
    out: Path = Path("runs/tiles")
    """Folder for the results."""
    overwrite: bool = False
    """Replace the results in the output folder."""


@dataclass(frozen=True)
class Study:
    """FFNs, batches that orders are made from, and batches that are measured."""

    title: str
    model: HasFFNs
    fit: list[Any]
    test: list[Any]
    images: dict[str, int]


def open_detector(arguments: Arguments) -> Study:
    model = detr_jax.load(arguments.model, preset=arguments.preset)
    check_blocks(model, arguments)
    found, images = {}, {}
    for use, split, wanted in (("fit", "train", arguments.fit_images), ("test", "val", arguments.images)):
        dataset = arguments.data.open(split, wanted)
        images[use] = len(dataset)
        found[use] = [batch.tokens for batch in embed(model, dataset, arguments.batch_size, use)]
    return Study(f"{arguments.model}, {dataset.name}", model, **found, images=images)


def open_arrays(arguments: Arguments) -> Study:
    ffns, inputs = read_ffns(arguments.arrays)
    check_blocks(ffns, arguments)
    count = len(next(iter(inputs.x.values())))
    if count < 2:
        raise InputError(f"{arguments.arrays} has inputs of {count} image; at least 2 are needed, one half to measure")
    halves = {"fit": range(count // 2), "test": range(count // 2, count)}
    found = {use: image_batches(inputs, half, arguments.batch_size) for use, half in halves.items()}
    return Study(arguments.arrays.stem, ffns, **found, images={use: len(half) for use, half in halves.items()})


def check_blocks(model: HasFFNs, arguments: Arguments) -> None:
    """Refuses blocks that do not divide the hidden neurons."""
    for ffn in model.ffn_weights().values():
        for size in arguments.block_sizes:
            group_count(len(ffn.w_in), size)


def neuron_orders(
    study: Study, arguments: Arguments
) -> tuple[dict[tuple[str, int], dict[str, np.ndarray]], dict[str, dict[int, TopPPermutation]]]:
    """Orders (F,) by name and block size, then by FFN; and top-p orders with their sections, by FFN and block size."""
    weights = study.model.ffn_weights()
    statistics = measure_activations(study.model, CachedBatches(study.fit))
    require_active(statistics, f"the images to fit of {study.title}")
    top_p = measure_top_p(study.model, study.fit, arguments.fit_tile_size, arguments.need_share)
    sections = {name: {} for name in weights}
    orders = {}
    with tqdm(total=len(weights) * len(arguments.block_sizes), desc="ordering neurons", unit="FFN") as bar:
        for size in arguments.block_sizes:
            for name, ffn in weights.items():
                sections[name][size] = by_top_p = top_p_permutation(top_p[name], size)
                found = {
                    "own": np.arange(len(ffn.w_in)),
                    "coactivation": coactivation_permutation(statistics[name].coactive, size),
                    "kmeans": kmeans_permutation(np.asarray(ffn.w_in, np.float32), size),
                    "contribution": np.argsort(-top_p[name].contributed, kind="stable"),
                    "top-p": by_top_p.order,
                }
                for title in NEURON_ORDERS:
                    orders.setdefault((title, size), {})[name] = found[title]
                bar.update()
    orders["own", 1] = {name: np.arange(len(ffn.w_in)) for name, ffn in weights.items()}
    return orders, sections


def as_json(measured: Mapping[str, Mapping[Setting, Measurement]]) -> list[dict]:
    return [
        {"ffn": name} | asdict(setting) | asdict(measurement)
        for name, of_ffn in measured.items()
        for setting, measurement in of_ffn.items()
    ]


def main(arguments: Arguments) -> None:
    started = time.perf_counter()
    refuse_existing(arguments.out / "results.json", arguments.overwrite)
    least = {"tile_sizes": 1, "order_tile_sizes": 1, "block_sizes": 2, "fit_tile_size": 1}
    check_options(arguments, shares=("shares", "need_share"), least=least)
    study = open_detector(arguments) if arguments.arrays is None else open_arrays(arguments)
    orders, sections = neuron_orders(study, arguments)

    tokens = token_counts(study.model, study.test)
    blocks = {1: "own"} | dict.fromkeys(arguments.block_sizes, "top-p")

    def settings(
        token_orders: tuple[TokenOrder, ...], tile_sizes: tuple[int, ...], neurons: Mapping[int, str]
    ) -> dict[str, list[Setting]]:
        return {name: settings_of(token_orders, tile_sizes, neurons, tokens=n) for name, n in tokens.items()}

    where = settings(get_args(TokenOrder), arguments.tile_sizes, blocks)
    compared: dict[str, list[Setting]] = {name: [] for name in tokens}
    for order in NEURON_ORDERS:
        of_order = settings(("raster",), arguments.order_tile_sizes, dict.fromkeys(arguments.block_sizes, order))
        compared = {name: compared[name] + of_order[name] for name in tokens}
    with tqdm(total=len(tokens) * len(study.test), desc="measuring tiles", unit="FFN") as bar:
        measured = measure_settings(
            study.model,
            study.test,
            {name: list(dict.fromkeys(where[name] + compared[name])) for name in tokens},
            orders,
            arguments.shares,
            arguments.need_share,
            bar.update,
        )
    where = {name: {s: measured[name][s] for s in of_ffn} for name, of_ffn in where.items()}
    compared = {name: {s: measured[name][s] for s in of_ffn} for name, of_ffn in compared.items()}

    text = study_markdown(study.images, where, compared, sections, arguments.need_share)
    print(text)
    with replacing(arguments.out / "tables.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    title = f"{study.title}: {study.images['fit']} images to fit, {study.images['test']} to measure"
    save_figure(plot_where(title, where, arguments.need_share), arguments.out / "where.png", dpi=110)
    save_figure(plot_neuron_orders(title, compared, arguments.need_share), arguments.out / "orders.png", dpi=110)
    seconds = time.perf_counter() - started
    results = {
        "data": study.title,
        "images": study.images,
        "measured": as_json(measured),
        "sections": {
            name: {size: {key: getattr(o, key) for key in ("always", "gated", "never")} for size, o in of.items()}
            for name, of in sections.items()
        },
        "seconds": seconds,
        **cli.provenance(arguments),
    }
    write_json(arguments.out / "results.json", results)
    print(f"\nresults.json, tables.md, where.png and orders.png are in {arguments.out} after {seconds:.0f} s")


if __name__ == "__main__":
    cli.run(main, Arguments)
