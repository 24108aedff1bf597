"""Token gates on a frozen detector: accuracy by scorer and share of the tokens, and the time of the whole detector."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from common import Scorer, check_options, check_rows, embed, frozen, markdown_table
from tqdm import tqdm

import detr_jax
from detr_jax.commands import cli
from detr_jax.commands.options import DataOptions
from detr_jax.data.loading import batches
from detr_jax.files import refuse_existing, replacing, write_json
from detr_jax.methods import GatedTokens, TokenGates
from detr_jax.models import Selectors
from detr_jax.search.timing import detector_outputs, interleaved_times
from detr_jax.viz.figures import COLOURS, new_figure, save_figure

ROWS = {
    "sparse-detr": (
        TokenGates(scorer="sparse-detr", labels="attention"),
        "its scorer and labels; not its auxiliary loss on encoder tokens, nothing else retrained",
    ),
    "linear": (TokenGates(scorer="linear", labels="attention"), "a linear scorer on the same labels"),
    "linear, updates": (TokenGates(scorer="linear", labels="update"), "looks for the largest updates of the layers"),
    "focus-detr": (
        TokenGates(scorer="sparse-detr", labels="attention"),
        "nested sets, fewer from layer to layer; not its labels from boxes, second attention or class head",
    ),
    "lite-detr": (TokenGates(scorer="levels"), "coarse levels first; not its key-aware attention or interleaving"),
    "random": (TokenGates(scorer="random"), "the same random places for all images"),
}
"""By name: how it is trained, and what of the method that has the name is done on a frozen detector."""
FOCUS = (1.0, 0.8, 0.6, 0.6, 0.4, 0.2)
"""Shares of the largest set in Focus-DETR's six layers (Zheng et al. 2023)."""


@dataclass(frozen=True)
class Arguments:
    """Measures what is lost where the encoder's layers update some image tokens only, and how long that takes.

    Scorers are trained on the frozen detector. With --plan, whose FFNs are sparse, both together too. For example
    `python scripts/studies/tokens.py --model deformable-tiny --data scenes:256 --plan deformable-tiny`. Writes
    results.json, tables.md and tokens.png into the output folder.
    """

    model: str = "detr-tiny"
    """Name of a detector, hub id, or path of a checkpoint."""
    preset: str | None = None
    """Architecture of a checkpoint that does not say which it is, e.g. detr-r50."""
    plan: str | None = None
    """Plan of the FFNs to measure alone and with token gates: a file, a folder, a hub id, or an embedded detector."""
    data: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=DataOptions)
    rows: tuple[str, ...] = tuple(ROWS)
    """Which rows to measure."""
    keep: tuple[float, ...] = (0.5, 0.3, 0.1)
    """Shares of the tokens."""
    train: int = 512
    """Training images."""
    epochs: int = 3
    """Passes over them."""
    images: int = 300
    """Validation images."""
    batch_size: int = 8
    """Images per batch."""
    timed: tuple[int, ...] = (1, 8)
    """Batch sizes at which the whole detector is timed."""
    repeats: int = 15
    """Measured turns, after two that warm up."""
    out: Path = Path("runs/tokens")
    """Folder for the results."""
    overwrite: bool = False
    """Replace the results in the output folder."""


def shares_of(row: str, keep: float, layers: int) -> tuple[float, ...]:
    """Shares of the tokens that each layer updates, whose mean is `keep`; none is above 1."""
    if row != "focus-detr":
        return (keep,)
    profile = np.interp(np.linspace(0, 1, layers), np.linspace(0, 1, len(FOCUS)), FOCUS)
    return tuple(float(share) for share in np.minimum(profile * keep / profile.mean(), 1))


def train_gates(model: Any, arguments: Arguments, data: Any) -> dict[str, GatedTokens]:
    """Token gates of every row; rows that are trained alike share a scorer."""
    trained: dict[TokenGates, GatedTokens] = {}
    found = {}
    for row in arguments.rows:
        method = replace(ROWS[row][0], keep=(max(arguments.keep),), epochs=arguments.epochs)
        if method not in trained:
            sparse = detr_jax.gate_tokens(model, data, method, batch_size=arguments.batch_size)
            trained[method] = sparse.plan.selectors["encoder"]
        found[row] = trained[method]
    return found


def _wait(*held: Any) -> None:
    jax.block_until_ready(detector_outputs(*held))


def time_detector(
    model: Any, settings: Mapping[str, Selectors], arguments: Arguments, dataset: Any
) -> dict[int, dict[str, float]]:
    """Seconds of the whole detector by batch size and setting, in turns."""
    found = {}
    for size in arguments.timed:
        batch = next(iter(batches(dataset, model.preprocessing, size)))
        images = jax.device_put((batch.pixel_values, batch.pixel_mask))
        calls: dict[str, Callable[[], Any]] = {
            title: partial(_wait, model, *images, selectors) for title, selectors in settings.items()
        }
        seconds = interleaved_times(calls, arguments.repeats)
        found[size] = {title: statistics.median(times) for title, times in seconds.items()}
    return found


def main(arguments: Arguments) -> None:
    check_options(
        arguments,
        shares=("keep",),
        least=dict.fromkeys(("train", "epochs", "images", "batch_size", "timed", "repeats"), 1),
    )
    check_rows(arguments.rows, ROWS)
    refuse_existing(arguments.out / "results.json", arguments.overwrite)
    model = detr_jax.load(arguments.model, preset=arguments.preset)
    training, validation = (
        arguments.data.open(split, count) for split, count in (("train", arguments.train), ("val", arguments.images))
    )
    (validation,) = arguments.data.matched(model.labels, validation)
    plan = None if arguments.plan is None else detr_jax.load_sparse(model, arguments.plan)
    with frozen(model):
        gates = train_gates(model, arguments, training)
        layers = model.config.encoder_layers
        features = embed(model, validation, arguments.batch_size, "validation")
        scorer = Scorer(model, validation, features, 8)
        settings: dict[tuple[str, float], tuple[Any, Selectors]] = {}
        for row, found in gates.items():
            for keep in arguments.keep:
                settings[row, keep] = model, {"encoder": found.keeping(*shares_of(row, keep, layers))}
        first = arguments.rows[0]
        if plan is not None:
            settings["plan", 1.0] = plan.detector, plan.plan.selectors
            for keep in arguments.keep:
                both = dict(plan.plan.selectors) | {"encoder": gates[first].keeping(keep)}
                settings[f"plan and {first}", keep] = plan.detector, both
        rows = [
            {"row": row, "keep": keep} | scorer(detector, selectors)
            for (row, keep), (detector, selectors) in tqdm(settings.items(), desc="measuring", unit="row")
        ]
        timed: dict[str, Selectors] = {"dense": {}}
        timed |= {f"{first}, {keep:g}": settings[first, keep][1] for keep in arguments.keep}
        seconds = time_detector(model, timed, arguments, validation)
        if plan is not None:
            auto = plan.with_implementation("auto")
            with_plan: dict[str, Selectors] = {"dense": {}, "plan": auto.plan.selectors}
            for keep in arguments.keep:
                both = dict(auto.plan.selectors) | {"encoder": gates[first].keeping(keep)}
                with_plan[f"plan and {first}, {keep:g}"] = both
            for size, more in time_detector(auto.detector, with_plan, arguments, validation).items():
                dense = more.pop("dense")  # in turns with it: what counts is the ratio
                seconds[size] |= {title: one / dense * seconds[size]["dense"] for title, one in more.items()}
    write_results(arguments, rows, seconds, scorer.dense_AP, validation)


def write_results(
    arguments: Arguments, rows: list[dict], seconds: Mapping[int, Mapping[str, float]], dense: float, dataset: Any
) -> None:
    """Writes the files and prints the tables."""
    accuracy = [
        [
            row["row"],
            f"{100 * row['keep']:g} %",
            "{:+.2f} [{:+.2f}, {:+.2f}]".format(
                *(100 * x for x in (row["AP_minus_dense"], *row["AP_minus_dense_interval"]))
            ),
        ]
        for row in rows
    ]
    text = f"Dense AP {dense:.3f}, {len(dataset)} images of {dataset.name}; points of AP against dense.\n\n"
    text += markdown_table(["row", "tokens", "points of AP"], accuracy, 1) + "\n\n"
    text += "".join(f"- {row}: {ROWS[row][1]}.\n" for row in arguments.rows) + "\n"
    titles = list(next(iter(seconds.values())))
    times = [
        [title, *(f"{of[title] / of['dense']:.2f}" for of in seconds.values())] for title in titles if title != "dense"
    ]
    measured = ", ".join(f"{1e3 * of['dense']:.1f} ms for {size}" for size, of in seconds.items())
    text += f"Time of the whole detector, dense = 1 ({measured}), {jax.devices()[0].device_kind}.\n\n"
    text += markdown_table(["", *(f"batch {size}" for size in seconds)], times, 1) + "\n"

    figure, axes = new_figure(f"{arguments.model}, {len(dataset)} images of {dataset.name}", (7, 4.2), 1, 1)
    for row, colour in zip(dict.fromkeys(row["row"] for row in rows), COLOURS, strict=False):
        of_row = sorted((one for one in rows if one["row"] == row), key=lambda one: one["keep"])
        keep, lost = [100 * one["keep"] for one in of_row], [100 * one["AP_minus_dense"] for one in of_row]
        bounds = 100 * np.array([one["AP_minus_dense_interval"] for one in of_row]).T
        axes.plot(keep, lost, "o-", markersize=4, color=colour, label=row)
        axes.fill_between(keep, *bounds, color=colour, alpha=0.12, linewidth=0)
    axes.axhline(0, color="0.7", linewidth=1)
    axes.set(xlabel="image tokens that encoder layers update, %", ylabel="points of AP against dense")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_figure(figure, arguments.out / "tokens.png")
    with replacing(arguments.out / "tables.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    results = {"rows": rows, "dense_AP": dense, "seconds": seconds, "images": len(dataset), "data": dataset.name}
    results |= {"done": {row: ROWS[row][1] for row in arguments.rows}}
    results |= {"methods": {row: asdict(ROWS[row][0]) for row in arguments.rows}}
    write_json(arguments.out / "results.json", results | cli.provenance(arguments))
    print(f"{text}\nwrote {arguments.out}")


if __name__ == "__main__":
    cli.run(main, Arguments)
