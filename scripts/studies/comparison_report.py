"""The comparison of selectors as tables, and these as Markdown."""

from collections.abc import Sequence

from studies.common import markdown_table

from detr_jax.evaluation.comparison import Row
from detr_jax.viz.report import Section
from detr_jax.viz.tables import Table

PAPER = (
    "Beside it, the paper's own numbers (arXiv 2510.09380, as a third party reads it), for a published DETR on COCO: "
    "dense mAP 39.9; MGS with one FFN gated 85 to 95 % activation sparsity with mAP kept; MGS with all FFNs gated at "
    "0.5 mAP 32.9, that is -7.0 points; SIBS about 20 % sparsity before accuracy suffers. No other number here is the "
    "paper's, and none of these can be compared with ours digit by digit."
)
STATIC = "static-contribution"
"""What a dynamic selector has to be worth more than."""
LOSSLESS = 0.003
"""Loss of AP up to which a row counts as keeping the accuracy: 0.3 points."""


def comparison_markdown(results: dict) -> str:
    """All tables of a comparison as Markdown.

    Args:
        results: what `scripts/compare_selectors.py` writes.
    """
    parts = introduction(results)
    for section in comparison_sections(results):
        parts.append(f"## {section.title}")
        parts += [_markdown(part) if isinstance(part, Table) else _escaped(str(part)) for part in section.parts]
    return "\n\n".join(parts) + "\n"


def _markdown(table: Table) -> str:
    rows = [[_escaped(cell) for cell in row] for row in table.text]
    return markdown_table(table.header, rows, left=table.numeric.index(True))


def _escaped(text: str) -> str:
    return text.replace("*", r"\*")


def introduction(results: dict) -> list[str]:
    """What is compared on what, and the paper's own numbers."""
    dense = next(row for row in results["rows"] if row["section"] == "dense")
    low, high = dense["AP_interval"]
    heading = (
        f"Selectors on the frozen detector {results['model']}, {results['images']} images of "
        f"{results['data']['validation']}: dense AP {dense['numbers']['AP']:.3f} [{low:.3f}, {high:.3f}]. Differences "
        "are in points of AP (hundredths), with 95 % intervals by resampling images, paired with dense. Groups of "
        f"{dense['group_size']} neurons. Work is the share of the FFNs' multiply-adds that is left, the selector's own "
        f"included. {results['implementation'].capitalize()}, float32, {results['device']}."
    )
    return [heading, PAPER]


def comparison_sections(results: dict) -> list[Section]:
    """All tables of a comparison under their titles; `results` are as of `comparison_markdown`."""
    rows = results["rows"]
    return [
        Section("Every selector at equal density", [_overview(rows), _BELOW_STATIC]),
        Section("MGS with all FFNs gated, one ingredient after the other", [_list(rows, "mgs")]),
        Section("Which FFNs cost the accuracy (MGS, threshold 0.5)", [_list(rows, "layers")]),
        Section("SIBS, and the bounds", [_list(rows, "sibs", "bounds")]),
        Section(
            "Density of neurons, groups and tiles of tokens (exact; MGS at 0.5)", [_tiles(results["tile_density"])]
        ),
        Section("Every row", [_list(rows, *dict.fromkeys(row["section"] for row in rows))]),
    ]


_BELOW_STATIC = (
    f"* dynamic, and worse than {STATIC}, at the same density: by more than {100 * LOSSLESS:g} points, and the "
    "intervals do not overlap. A selector of neurons or channels saves one of the two products only."
)


def _overview(rows: Sequence[Row]) -> Table:
    """A line for each selector, a column for each density."""
    methods = [row for row in rows if row["section"] == "methods"]
    settings = list(dict.fromkeys(row["setting"] for row in methods))
    static = {row["setting"]: row for row in methods if row["selector"] == STATIC}
    lines = []
    for name in dict.fromkeys(row["selector"] for row in methods):
        own = {row["setting"]: row for row in methods if row["selector"] == name}
        first = next(iter(own.values()))
        kept = [row["flops_share"]["ffns"] for row in own.values() if row["AP_minus_dense"] >= -LOSSLESS]
        needs = first["needs"] + ("" if first["dynamic"] else ", static")
        least = f"{min(kept):.2f}" if kept else "-"
        lines.append(
            [name, needs, first["granularity"], first["saves"]]
            + [_cell(own.get(setting), static.get(setting)) for setting in settings]
            + [least]
        )
    header = ["selector", "needs", "decides by", "saves", *settings, f"least work at {100 * LOSSLESS:g} points"]
    return Table(header, lines)


def _cell(row: Row | None, static: Row | None) -> str:
    """A difference to dense, marked where a dynamic selector is worse than the static one."""
    if row is None:
        return ""
    worse = (
        static is not None
        and row["AP_minus_dense"] < static["AP_minus_dense"] - LOSSLESS
        and row["AP_minus_dense_interval"][1] < static["AP_minus_dense_interval"][0]
    )
    return _difference(row) + ("*" if worse and row["dynamic"] else "")


def _list(rows: Sequence[Row], *sections: str) -> Table:
    """A line for each row of some sections."""
    lines = [
        [
            row["selector"],
            row["setting"],
            *_kind(row),
            f"{row['numbers']['AP']:.3f}",
            _difference(row),
            f"{100 * row['density']:.1f} %",
            f"{100 * row['group_sparsity']:.1f} %",
            f"{100 * row['recall']:.1f} %",
            f"{row['flops_share']['ffns']:.3f}",
            f"{row['flops_share']['transformer']:.3f}",
            f"{row['flops_share']['detector']:.3f}",
        ]
        for row in rows
        if row["section"] in sections
    ]
    header = ["selector", "setting", "decides by", "when", "trained", "AP", "points against dense"]
    header += ["neurons computed", "groups skipped", "recall", "FFN work", "transformer", "detector"]
    return Table(header, lines)


def _kind(row: Row) -> tuple[str, str, str]:
    """Granularity, static or dynamic, trained or not; the dense detector decides nothing."""
    if row["section"] == "dense":
        return "", "", ""
    return row["granularity"], "dynamic" if row["dynamic"] else "static", "yes" if row["trained"] else "no"


def _tiles(densities: dict) -> Table:
    """A line for each FFN, a column for each size of tile: in raster order / ordered by signature."""
    sizes = list(next(iter(densities.values()))["exact"]["raster"])
    lines = [
        [name, kind, f"{of['neurons']:.3f}" if kind == "exact" else ""]
        + [f"{of[kind]['raster'][size]:.2f} / {of[kind]['signature'][size]:.2f}" for size in sizes]
        for name, of in densities.items()
        for kind in ("exact", "predicted")
    ]
    header = ["FFN", "groups", "neurons", *(f"tiles of {size}" for size in sizes)]
    return Table(header, lines)


def _difference(row: Row) -> str:
    low, high = row["AP_minus_dense_interval"]
    return f"{100 * row['AP_minus_dense']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
