"""Studies where sparsity goes between a token and what hardware skips, and what orders of tokens and neurons keep."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from ffn_study import image_batches, read_ffns
from tile_study import (
    TOKEN_ORDERS,
    Measurement,
    Setting,
    StudyBatch,
    TokenOrder,
    measure_settings,
    settings_of,
    token_counts,
)
from tile_study_report import plot_neuron_orders, plot_where, study_markdown
from tqdm import tqdm

import detr_jax
from detr_jax.calibration.activation_passes import measure_activations
from detr_jax.calibration.permutation import (
    TopPPermutation,
    coactivation_permutation,
    kmeans_permutation,
    top_p_permutation,
)
from detr_jax.calibration.top_p import measure_top_p
from detr_jax.commands import cli
from detr_jax.data.batches import CachedBatches
from detr_jax.data.features import backbone_features
from detr_jax.data.registry import open_dataset
from detr_jax.errors import InputError
from detr_jax.files import refuse_existing, replacing, write_json
from detr_jax.methods.grouping import group_count
from detr_jax.models.standalone import HasFFNs

NEURON_ORDERS = ("own", "cofiring", "kmeans", "contribution", "need")


@dataclass(frozen=True)
class Arguments:
    """Studies where sparsity goes between a token and what hardware skips: tiles of tokens times blocks of neurons.

    Of a detector, or of FFNs given as arrays with samples of their inputs. Measured is the density of exact firing, of
    what makes up nearly all of a tile's contribution, and the output's error when every tile keeps the part of the
    blocks that contributes most to it: for tiles of every size in several orders of the tokens, and for several orders
    of the neurons.

    For example `python scripts/studies/tiles.py`, or `python scripts/studies/tiles.py --arrays ffns.npz`. Writes
    results.json, tables.md, where.png and orders.png into the output folder.
    """

    model: str = "detr-tiny"
    """Name of a detector or path of a checkpoint."""
    preset: str | None = None
    """Architecture of a checkpoint that does not say which it is, e.g. detr-r50."""
    coco: Path | None = None
    """Folder with train2017/, val2017/ and annotations/; without it, scenes are generated."""
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
    out: Path = Path("runs/study_tiles")
    """Folder for the results."""
    overwrite: bool = False
    """Replace the results in the output folder."""


@dataclass(frozen=True)
class Study:
    """FFNs, the inputs that orders are made from, and those that are measured."""

    title: str
    ffns_of: HasFFNs
    fit: list[StudyBatch]
    test: list[StudyBatch]
    images: dict[str, int]


def open_detector(arguments: Arguments) -> Study:
    model = detr_jax.load(arguments.model, preset=arguments.preset)
    in_encoder = [name for name in model.config.ffn_names if name.startswith("encoder")]
    found, images = {}, {}
    for use, split, wanted in (("fit", "train", arguments.fit_images), ("test", "val", arguments.images)):
        dataset = open_dataset(arguments.coco, split, wanted)
        images[use] = len(dataset)
        found[use] = [
            StudyBatch(batch.tokens, dict.fromkeys(in_encoder, batch.grid))
            for batch in backbone_features(model, dataset, arguments.batch_size, f"embedding images to {use}")
        ]
    return Study(f"{arguments.model}, {dataset.name}", model, **found, images=images)


def open_arrays(path: Path, batch_size: int) -> Study:
    ffns, inputs = read_ffns(path)
    count = len(next(iter(inputs.x.values())))
    if count < 2:
        raise InputError(f"{path} has the inputs of {count} image; at least 2 are needed, one half to measure")
    halves = {"fit": range(count // 2), "test": range(count // 2, count)}
    found = {use: [StudyBatch(b, {}) for b in image_batches(inputs, half, batch_size)] for use, half in halves.items()}
    return Study(path.stem, ffns, **found, images={use: len(half) for use, half in halves.items()})


def neuron_orders(
    study: Study, arguments: Arguments
) -> tuple[dict[tuple[str, int], dict[str, np.ndarray]], dict[str, dict[int, TopPPermutation]]]:
    """Orders (F,) by name and block size, then by FFN; and those by need with their sections, by FFN and block size."""
    weights = study.ffns_of.ffn_weights()
    inputs = [batch.inputs for batch in study.fit]
    firing = measure_activations(study.ffns_of, CachedBatches(inputs), 1)
    need = measure_top_p(study.ffns_of, inputs, arguments.fit_tile_size, arguments.need_share)
    sections = {name: {} for name in weights}
    orders = {}
    with tqdm(total=len(weights) * len(arguments.block_sizes), desc="ordering neurons", unit="FFN") as bar:
        for size in arguments.block_sizes:
            for name, ffn in weights.items():
                sections[name][size] = by_need = top_p_permutation(need[name], size)
                found = {
                    "own": np.arange(len(ffn.w_in)),
                    "cofiring": coactivation_permutation(firing[name].coactive, size),
                    "kmeans": kmeans_permutation(np.asarray(ffn.w_in, np.float32), size),
                    "contribution": np.argsort(-need[name].contributed, kind="stable"),
                    "need": by_need.order,
                }
                for title in NEURON_ORDERS:
                    orders.setdefault((title, size), {})[name] = found[title]
                bar.update()
    orders["own", 1] = {name: np.arange(len(ffn.w_in)) for name, ffn in weights.items()}
    return orders, sections


def check(arguments: Arguments) -> None:
    """Refuses what cannot be computed, before anything is."""
    for option in ("tile_sizes", "block_sizes", "shares", "order_tile_sizes"):
        if not getattr(arguments, option):
            raise InputError(f"--{option.replace('_', '-')} needs at least one value")
    for option, smallest in (("tile_sizes", 1), ("order_tile_sizes", 1), ("block_sizes", 2)):
        if (least := min(getattr(arguments, option))) < smallest:
            raise InputError(f"--{option.replace('_', '-')} must be at least {smallest}, not {least}")
    if arguments.fit_tile_size < 1:
        raise InputError(f"--fit-tile-size must be at least 1, not {arguments.fit_tile_size}")
    for option, values in (("shares", arguments.shares), ("need-share", (arguments.need_share,))):
        if wrong := [share for share in values if not 0 < share <= 1]:
            raise InputError(f"--{option} must be above 0 and at most 1, not {wrong[0]:g}")


def as_json(measured: Mapping[str, Mapping[Setting, Measurement]]) -> list[dict]:
    return [
        {"ffn": name} | asdict(setting) | asdict(measurement)
        for name, of_ffn in measured.items()
        for setting, measurement in of_ffn.items()
    ]


def main(arguments: Arguments) -> None:
    started = time.perf_counter()
    refuse_existing(arguments.out / "results.json", arguments.overwrite)
    check(arguments)
    study = (
        open_detector(arguments) if arguments.arrays is None else open_arrays(arguments.arrays, arguments.batch_size)
    )
    for ffn in study.ffns_of.ffn_weights().values():
        for size in arguments.block_sizes:
            group_count(len(ffn.w_in), size)
    orders, sections = neuron_orders(study, arguments)

    tokens = token_counts(study.ffns_of, study.test)
    blocks = {1: "own"} | dict.fromkeys(arguments.block_sizes, "need")

    def settings(
        token_orders: tuple[TokenOrder, ...], tile_sizes: tuple[int, ...], neurons: Mapping[int, str]
    ) -> dict[str, list[Setting]]:
        grids = study.test[0].grids
        return {
            name: settings_of(token_orders, tile_sizes, neurons, tokens=count, on_grid=name in grids)
            for name, count in tokens.items()
        }

    where = settings(TOKEN_ORDERS, arguments.tile_sizes, blocks)
    compared: dict[str, list[Setting]] = {name: [] for name in tokens}
    for order in NEURON_ORDERS:
        of_order = settings(("raster",), arguments.order_tile_sizes, dict.fromkeys(arguments.block_sizes, order))
        compared = {name: compared[name] + of_order[name] for name in tokens}
    with tqdm(total=len(tokens) * len(study.test), desc="measuring tiles", unit="FFN") as bar:
        measured = measure_settings(
            study.ffns_of,
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
        temporary.write_text(text + "\n")
    title = f"{study.title}: {study.images['fit']} images to fit, {study.images['test']} to measure"
    plot_where(arguments.out / "where.png", title, where, arguments.need_share)
    plot_neuron_orders(arguments.out / "orders.png", title, compared, arguments.need_share)
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
