"""The figure of a search: accuracy against time and density, and what the plan does with each FFN."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

from detr_jax.files import replacing
from detr_jax.search.candidates import KINDS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_PAIRS = plt.get_cmap("tab20").colors
COLOURS = dict(zip(KINDS, ("0.6", _PAIRS[3], _PAIRS[2], _PAIRS[1], _PAIRS[0], _PAIRS[9], _PAIRS[8]), strict=True))


def plot_search(
    path: Path,
    title: str,
    curves: Mapping[str, Mapping[str, Sequence[Mapping]]],
    plan: Mapping,
    ffns: Mapping[str, Mapping],
) -> None:
    """Draws the search's points and its plan.

    Args:
        path: of the figure, a PNG.
        title: model, data and device.
        curves: of what was chosen for shares of "latency" and of "density", by what could be chosen, points with
            `time` and `density`, shares of the dense FFNs', `AP_minus_dense` and its interval.
        plan: the point of the plan.
        ffns: of each FFN its `kind`, `always` and `density` in the plan.
    """
    figure, (by_time, by_density, layers) = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    for axes, unit, key, label in (
        (by_time, "latency", "time", "measured time of all FFNs, dense = 1"),
        (by_density, "density", "density", "share of the neurons that is computed"),
    ):
        styles = (("tab:green", "o-"), ("tab:blue", "s--"), ("tab:orange", "^:"))
        for (name, points), (colour, line) in zip(curves[unit].items(), styles, strict=False):
            points = sorted(points, key=lambda point: point[key])
            x, y = ([point[k] for point in points] for k in (key, "AP_minus_dense"))
            low, high = zip(*(point["AP_minus_dense_interval"] for point in points), strict=True)
            axes.plot(x, [100 * value for value in y], line, markersize=4, color=colour, label=name)
            axes.fill_between(x, [100 * v for v in low], [100 * v for v in high], color=colour, alpha=0.15, linewidth=0)
        axes.plot(plan[key], 100 * plan["AP_minus_dense"], "k*", markersize=13, label="the plan")
        axes.axhline(0, color="0.7", linewidth=1)
        axes.set(xlabel=label, xlim=(0, None))
        axes.grid(alpha=0.3)
    least = min(100 * point["AP_minus_dense"] for of in curves.values() for points in of.values() for point in points)
    by_time.set(ylabel="points of AP against dense", ylim=(max(least, -12) - 1, 1))
    by_density.set(ylim=by_time.get_ylim())
    by_time.legend()

    partly = [0 < of_ffn["always"] < of_ffn["density"] for of_ffn in ffns.values()]
    for i, of_ffn in enumerate(ffns.values()):
        colour = COLOURS[of_ffn["kind"]]
        layers.bar(i, of_ffn["density"], color=colour)
        if partly[i]:
            layers.bar(i, of_ffn["always"], color=colour, hatch="//", edgecolor="white")
    for kind in dict.fromkeys(of_ffn["kind"] for of_ffn in ffns.values()):
        layers.bar(0, 0, color=COLOURS[kind], label=kind)
    if any(partly):
        layers.bar(0, 0, color="white", hatch="//", edgecolor="0.3", label="of that, always computed")
    layers.set_xticks(range(len(ffns)), list(ffns), rotation=30, ha="right")
    layers.set(ylabel="share of the neurons that the plan computes")
    layers.legend()
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
