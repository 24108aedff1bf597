"""Figures of the comparison of selectors."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from detr_jax.evaluation.comparison import Row
from detr_jax.viz.figures import COLOURS, label_ffns, new_figure, save_figure

CLOSE = 0.04
"""How far below dense the lower half of the accuracy figure reaches, in AP."""
NEVER = 1e-6
"""Where a logarithmic axis shows a share of zero."""
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


def plot_comparison(results: dict, folder: Path) -> None:
    """Writes accuracy.png, sizes.png, tile_density.png, activations.png and layers.png.

    Args:
        results: what `scripts/compare_selectors.py` writes.
        folder: for the figures.
    """
    title = f"{results['model']}, {results['images']} images of {results['data']['validation']}"
    for name, plot in (
        ("accuracy", _accuracy),
        ("sizes", _sizes),
        ("tile_density", _tile_density),
        ("activations", _activations),
        ("layers", _layers),
    ):
        figure = plot(results)
        figure.suptitle(f"{figure.get_suptitle()}: {title}")
        save_figure(figure, folder / f"{name}.png")


def _rows(results: dict, *sections: str) -> list[Row]:
    return [row for row in results["rows"] if row["section"] in sections]


def _styles(results: dict) -> dict[str, dict]:
    """A colour and a marker for each selector, the same in all figures."""
    names = dict.fromkeys(row["selector"] for row in _rows(results, "methods", "sibs"))
    lines = ("-", "--", ":")
    markers = "os^vD"
    return {
        name: {"color": COLOURS[i % 10], "linestyle": lines[i // 10 % 3], "marker": markers[i % 5], "markersize": 4}
        for i, name in enumerate(names)
    }


def _accuracy(results: dict) -> Figure:
    """AP against density, and against the work that is left; below, what happens close to the dense detector."""
    title = "AP of every method, 95 % intervals of the difference to dense"
    figure, panels = new_figure(title, (15, 11), 2, 2, sharex="col", sharey="row", height_ratios=(1, 1.3))
    methods = _rows(results, "methods", "sibs")
    dense = results["rows"][0]["numbers"]["AP"]
    for column, x_of, label in (
        (0, _kept, "share of neurons computed (of input channels, for methods that drop those)"),
        (1, lambda row: row["flops_share"]["ffns"], "share of the FFNs' multiply-adds, method included"),
    ):
        for axes in panels[:, column]:
            for name, style in _styles(results).items():
                rows = sorted((row for row in methods if row["selector"] == name), key=x_of)
                ap = np.array([row["numbers"]["AP"] for row in rows])
                ends = dense + np.array([row["AP_minus_dense_interval"] for row in rows]).T
                error = np.maximum([ap - ends[0], ends[1] - ap], 0)
                axes.errorbar([x_of(row) for row in rows], ap, error, label=name, linewidth=1.2, capsize=2, **style)
            for row, marker in zip(_rows(results, "bounds"), "*P", strict=True):
                label_of = f"oracle, {row['setting']}"
                axes.plot(x_of(row), row["numbers"]["AP"], f"k{marker}", markersize=10, label=label_of)
            axes.axhline(dense, color="k", linewidth=0.8)
            _log_axis(axes)
        panels[1, column].set_xlabel(label)
    panels[1, 0].set_ylim(dense - CLOSE, dense + CLOSE / 4)
    for axes, text in zip(panels[:, 0], ("AP", "AP, close to dense"), strict=True):
        axes.set_ylabel(text)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    return figure


def _log_axis(axes: Axes) -> None:
    """Shares on a logarithmic scale, written as one says them."""
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _kept(row: Row) -> float:
    return row["density"] * row["channel_density"]


def _sizes(results: dict) -> Figure:
    """What each selector costs by size of object."""
    methods = _rows(results, "methods", "sibs")
    dense = results["rows"][0]["numbers"]
    sizes = [key for key in ("APs", "APm", "APl") if dense[key] is not None and dense[key] >= 0]  # None: undefined
    figure, panels = new_figure("AP by object size", (6 * len(sizes) + 3, 5.5), 1, len(sizes), squeeze=False)
    words = {"APs": "small", "APm": "medium", "APl": "large"}
    for axes, size in zip(panels[0], sizes, strict=True):
        for name, style in _styles(results).items():
            rows = sorted((row for row in methods if row["selector"] == name), key=_kept)
            axes.plot([_kept(row) for row in rows], [row["numbers"][size] for row in rows], label=name, **style)
        axes.axhline(results["rows"][0]["numbers"][size], color="k", linewidth=0.8)
        _log_axis(axes)
        axes.set_title(f"{words[size]} objects ({size})")
        axes.set_xlabel("share computed")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    return figure


def _tile_density(results: dict) -> Figure:
    """Density of active neurons, of groups and of tiles, per FFN."""
    densities = results["tile_density"]
    names = list(densities)
    tiles = [int(size) for size in next(iter(densities.values()))["exact"]["raster"] if int(size) > 1]
    title = "Density from active neurons to computed tiles (MGS, threshold 0.5)"
    figure, axes = new_figure(title, (max(12, 2.2 * len(names)), 5.5))
    steps = [("active neurons", lambda of: of["neurons"], "k")]
    for kind, colours in (("exact", "Blues"), ("predicted", "Oranges")):
        shades = colormaps[colours](np.linspace(0.35, 0.95, len(tiles) + 1))
        steps.append((f"{kind} groups", lambda of, kind=kind: _at(of[kind]["raster"], 1), shades[0]))
        for size, shade in zip(tiles, shades[1:], strict=True):
            steps.append((f"{kind}, tiles of {size}", lambda of, k=kind, s=size: _at(of[k]["raster"], s), shade))
    width = 0.85 / len(steps)
    position = np.arange(len(names))
    for i, (label, value, colour) in enumerate(steps):
        heights = [value(densities[n]) for n in names]
        axes.bar(position + (i - len(steps) / 2) * width, heights, width, color=colour, label=label)
    for kind, first in (("exact", 2), ("predicted", 2 + len(tiles) + 1)):
        for j, size in enumerate(tiles):
            x = position + (first + j - len(steps) / 2) * width
            ordered = [_at(densities[n][kind]["signature"], size) for n in names]
            label = "the same, tokens sorted by signature" if (kind, j) == ("exact", 0) else None
            axes.plot(x, ordered, "k_", markersize=width * 60, markeredgewidth=1.5, label=label)
    label_ffns(axes, names)
    axes.set_ylabel("density")
    figure.legend(loc="outside lower center", ncols=6, fontsize=8)
    return figure


def _at(densities: dict, size: int) -> float:
    """JSON turns numbers into text where they are keys."""
    return densities[size] if size in densities else densities[str(size)]


def _activations(results: dict) -> Figure:
    """Activation sparsity of each FFN by kind of token, and the share of groups that MGS computes."""
    statistics = results["statistics"]
    names = list(statistics)
    title = "Activation statistics and sparsity of each FFN"
    figure, (shares, rates) = new_figure(title, (15, 5), 1, 2, width_ratios=(1.5, 1))
    position = np.arange(len(names))
    gated = _rows(results, "mgs")[-1]  # with all ingredients
    columns = [
        ("background tokens, unmatched queries", lambda n: statistics[n]["firing"][0]),
        ("tokens on objects, matched queries", lambda n: statistics[n]["firing"][1]),
        ("neurons active anywhere in an image", lambda n: statistics[n]["firing_in_an_image"]),
        ("groups computed by tuned MGS", lambda n: 1 - gated["ffns"][n]["group_sparsity"]),
    ]
    width = 0.85 / len(columns)
    for i, (label, value) in enumerate(columns):
        shares.bar(position + (i - (len(columns) - 1) / 2) * width, [value(n) for n in names], width, label=label)
    shares.set_yscale("log")
    label_ffns(shares, names)
    shares.set_ylabel("share")
    shares.legend(fontsize=8)
    for name in names:
        rates.plot(np.linspace(0, 100, 11), np.maximum(statistics[name]["deciles"], NEVER), marker=".", label=name)
    rates.set_yscale("log")
    rates.set_xlabel("neurons, percentile")
    rates.set_ylabel("share of tokens for which the neuron is active (1e-6: none)")
    rates.grid(alpha=0.3)
    rates.legend(fontsize=8)
    return figure


def _layers(results: dict) -> Figure:
    """Which FFNs cost the accuracy: one at a time, then one more at a time."""
    rows = _rows(results, "layers")
    figure, panels = new_figure("MGS at threshold 0.5", (13, 5), 1, 2, sharey=True)
    for axes, title, chosen in (
        (panels[0], "one FFN gated", [row for row in rows if row["setting"].endswith("alone")]),
        (panels[1], "all gated up to this one", [row for row in rows if row["setting"].startswith("up to")]),
    ):
        names = [row["setting"].removesuffix(" alone").removeprefix("up to ") for row in chosen]
        points = np.array([100 * row["AP_minus_dense"] for row in chosen])
        ends = 100 * np.array([row["AP_minus_dense_interval"] for row in chosen]).T
        axes.bar(names, points, yerr=np.maximum([points - ends[0], ends[1] - points], 0), capsize=4, color="C3")
        axes.axhline(0, color="k", linewidth=0.8)
        label_ffns(axes, names)
        axes.set_title(title)
    panels[0].set_ylabel("points of AP against dense, 95 % intervals")
    return figure
