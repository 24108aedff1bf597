"""Tables and the figure of recipes at several densities: points of AP, density of tiles, and time of the FFNs."""

from collections.abc import Mapping, Sequence

from common import markdown_table
from matplotlib.figure import Figure

from detr_jax.viz.figures import COLOURS, new_figure
from detr_jax.viz.tables import points_of_ap

LOST = 0.5
"""Points of AP at which recipes are compared."""


def by_recipe(points: Sequence[Mapping]) -> dict[str, list[Mapping]]:
    """The points of each recipe, the densest first."""
    recipes: dict[str, list[Mapping]] = {}
    for point in points:
        recipes.setdefault(point["recipe"], []).append(point)
    return {recipe: sorted(of, key=lambda point: -point["density"]) for recipe, of in recipes.items()}


def best_table(points: Sequence[Mapping]) -> str:
    """Of each recipe the sparsest and the fastest point that loses at most `LOST` points, as Markdown."""
    header = ["recipe", "least tile density", "points of AP", "least time", "points of AP", "times as fast as dense"]
    rows = []
    for recipe, of in by_recipe(points).items():
        good = [point for point in of if -100 * point["AP_minus_dense"] <= LOST]
        if not good:
            rows.append([recipe, *["-"] * 5])
            continue
        sparsest, fastest = (min(good, key=lambda point, key=key: point[key]) for key in ("density", "time"))
        rows.append(
            [
                *(recipe, f"{sparsest['density']:.3f}", points_of_ap(sparsest)),
                *(f"{fastest['time']:.2f}", points_of_ap(fastest), f"{1 / fastest['time']:.2f}"),
            ]
        )
    return markdown_table(header, rows, left=1)


def points_table(points: Sequence[Mapping]) -> str:
    """Every point, as Markdown."""
    rows = [
        [recipe, point["setting"], points_of_ap(point), f"{point['density']:.3f}", f"{point['time']:.2f}"]
        for recipe, of in by_recipe(points).items()
        for point in of
    ]
    return markdown_table(["recipe", "setting", "points of AP", "tile density", "time of the FFNs"], rows, left=2)


def plot_recipes(title: str, points: Sequence[Mapping]) -> Figure:
    """Accuracy against density of tiles and against time.

    Args:
        title: model and data.
        points: with `recipe`, `density`, `time`, `AP_minus_dense` and its interval; `chosen_by` "density" or "latency"
            keeps a point out of the other panel.
    """
    figure, panels = new_figure(title, (13, 6.4), 1, 2, sharey=True)
    labels = {"density": "share of (token tile, neuron block) pairs computed", "time": "time of all FFNs, dense = 1"}
    units = {"density": "density", "time": "latency"}
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        for i, (recipe, of) in enumerate(by_recipe(points).items()):
            of = [point for point in of if point["chosen_by"] in (None, units[key])]
            of.sort(key=lambda point: point[key])
            x, y = [point[key] for point in of], [100 * point["AP_minus_dense"] for point in of]
            bounds = [[100 * bound for bound in point["AP_minus_dense_interval"]] for point in of]
            errors = [[max(value - low, 0) for value, (low, _) in zip(y, bounds, strict=True)]]
            errors.append([max(high - value, 0) for value, (_, high) in zip(y, bounds, strict=True)])
            style = {"linestyle": "--" if i >= len(COLOURS) else "-", "color": COLOURS[i % len(COLOURS)]}
            axes.errorbar(x, y, errors, marker="o", markersize=4, capsize=2, linewidth=1.2, label=recipe, **style)
        axes.axhline(-LOST, color="0.5", linewidth=1, linestyle=":")
        axes.set(xlabel=label, xlim=(0, None), ylim=(-8, 0.6))
        axes.grid(alpha=0.3)
    panels[1].axvline(1, color="0.5", linewidth=1, linestyle=":")
    panels[0].set(ylabel="points of AP against dense")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
