"""Where neurons fire, and where a plan computes them: by stride, over objects and background, by query."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from common import markdown_table
from matplotlib.figure import Figure

import detr_jax
from detr_jax.commands import cli
from detr_jax.commands.options import DataOptions
from detr_jax.errors import InputError, require_counts
from detr_jax.evaluation.places import PlaceDensity, density_by_place
from detr_jax.files import refuse_existing, replacing, write_json
from detr_jax.viz.figures import COLOURS, new_figure, save_figure

Places = Mapping[str, Mapping[str, PlaceDensity]]


@dataclass(frozen=True)
class Arguments:
    """Measures which share of the hidden neurons fires, by the stride of image tokens, whether their centre is over an
    object, and whether the set matching gives an object query an object; with a plan, which share it computes there.

    For example `python scripts/studies/places.py --model deformable-tiny --plan deformable-tiny --data scenes:256`.
    Writes results.json, tables.md and places.png into the output folder.
    """

    model: str = "detr-tiny"
    """Name of a detector, hub id, or path of a checkpoint."""
    preset: str | None = None
    """Architecture of a checkpoint that does not say which it is, e.g. detr-r50."""
    plan: str | None = None
    """Plan of the detector: a file, a folder, a hub id, or an embedded detector."""
    data: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=DataOptions)
    images: int = 200
    """Validation images."""
    batch_size: int = 8
    """Images per batch."""
    out: Path = Path("runs/places")
    """Folder for the results."""
    overwrite: bool = False
    """Replace the results in the output folder."""


def tables(shown: Mapping[str, Places]) -> str:
    """Markdown, one table for FFNs with the same places; `shown` are shares by their titles."""
    first = next(iter(shown.values()))
    parts: dict[tuple[str, ...], list[str]] = {}
    for name, places in first.items():
        parts.setdefault(tuple(places), []).append(name)
    found = []
    for places, names in parts.items():
        counted = [f"{first[names[0]][place].tokens:,}" for place in places]
        rows = [["", "tokens", *counted]]
        for title, of_ffns in shown.items():
            key = "fired" if title == "fire" else "computed"
            rows += [
                [name, title, *(f"{100 * getattr(of_ffns[name][place], key):.1f} %" for place in places)]
                for name in names
            ]
        found.append(markdown_table(["FFN", "", *places], rows, 2))
    return "\n\n".join(found) + "\n"


def plot_places(title: str, dense: Places, planned: Places | None) -> Figure:
    """Bars of what fires, with a line where the plan computes more."""
    encoder = [name for name, places in dense.items() if len(places) > 2 or "background" in str(list(places))]
    parts = [part for part in (encoder, [name for name in dense if name not in encoder]) if part]
    widths = [max(len(part) * len(dense[part[0]]), 6) for part in parts]
    figure, panels = new_figure(title, (13, 4.2), 1, len(parts), width_ratios=widths, squeeze=False)
    for axes, names in zip(panels[0], parts, strict=True):
        places = list(dense[names[0]])
        width = 0.84 / len(places)
        for i, place in enumerate(places):
            x = np.arange(len(names)) + (i - (len(places) - 1) / 2) * width
            colour = COLOURS[i // 2] if len(places) > 2 else COLOURS[3 + i]
            fired = [100 * dense[name][place].fired for name in names]
            axes.bar(x, fired, width, color=colour, alpha=0.45 if i % 2 == 0 else 1, label=place)
            if planned is not None:
                computed = [100 * planned[name][place].computed for name in names]
                label = "computed by the plan" if i == 0 else None
                axes.hlines(computed, x - 0.46 * width, x + 0.46 * width, color="k", label=label)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel("share of the hidden neurons, %")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def main(arguments: Arguments) -> None:
    require_counts(arguments, "images", "batch_size")
    results = arguments.out / "results.json"
    refuse_existing(results, arguments.overwrite)
    model = detr_jax.load(arguments.model, preset=arguments.preset)
    (dataset,) = arguments.data.matched(model.labels, arguments.data.open("val", arguments.images))
    if not dataset.has_annotations:
        raise InputError(f"{dataset.name} has no annotations, which say where objects are")
    dense = density_by_place(model, dataset, arguments.batch_size, progress="dense")
    shown, planned = {"fire": dense}, None
    if arguments.plan is not None:
        sparse = detr_jax.load_sparse(model, arguments.plan)
        planned = density_by_place(
            sparse.detector, dataset, arguments.batch_size, sparse.plan.selectors, progress="with the plan"
        )
        shown["computed"] = planned
    text = tables(shown)
    arguments.out.mkdir(parents=True, exist_ok=True)
    title = f"{arguments.model} on {len(dataset)} images of {dataset.name}"
    save_figure(plot_places(title, dense, planned), arguments.out / "places.png")
    with replacing(arguments.out / "tables.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    found = {
        name: {ffn: {place: dataclasses.asdict(d) for place, d in of.items()} for ffn, of in places.items()}
        for name, places in shown.items()
    }
    write_json(results, {"images": len(dataset), "data": dataset.name} | found | cli.provenance(arguments))
    print(f"{title}\n\n{text}\nwrote {arguments.out}")


if __name__ == "__main__":
    cli.run(main, Arguments)
