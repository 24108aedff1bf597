"""Figures of results, as matplotlib `Figure` objects: pyplot and its global state are not imported."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from detr_jax.evaluation.coco_ap import shown
from detr_jax.evaluation.comparison import Row
from detr_jax.evaluation.evaluate import Scores
from detr_jax.files import replacing
from detr_jax.search.candidates import CANDIDATE_KINDS

COLOURS = [colormaps["tab10"](i) for i in range(10)]
KIND_COLOURS = dict(zip(CANDIDATE_KINDS, ("0.6", *(colormaps["tab20"](i) for i in (3, 2, 4))), strict=True))


def new_figure(title: str, size: tuple[float, float], *grid: int, **options: Any) -> tuple[Figure, Any]:
    """A figure of `size` inches and its panels; `grid` and `options` as in `Figure.subplots`."""
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(*grid, **options)


def save_figure(figure: Figure, path: Path, dpi: int = 130) -> None:
    """Writes a figure as a PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")


def label_ffns(axes: Axes, names: Sequence[str]) -> None:
    """Names of FFNs below bars at 0, 1, ...; slanted where they are many."""
    rotation = 60 if len(names) > 8 else 30
    axes.set_xticks(range(len(names)), names, rotation=rotation, ha="right", rotation_mode="anchor")
    axes.grid(axis="y", alpha=0.3)


def plot_gates(title: str, dense: Scores, gated: Mapping[str, Scores]) -> Figure:
    """Sparsity and recall of every FFN, and AP, or without it the outputs' divergence, against mean group sparsity.

    `gated` has by title the detector with all FFNs gated in some way.
    """
    figure, (sparsity, recall, accuracy) = new_figure(title, (15, 4.8), 1, 3, width_ratios=(1.3, 1.3, 1))
    names, width = list(dense.counts), 0.8 / len(gated)
    position = np.arange(len(names))
    for i, ((name, run), colour) in enumerate(zip(gated.items(), COLOURS, strict=False)):
        bars = {"x": position + (i - (len(gated) - 1) / 2) * width, "width": width, "color": colour, "label": name}
        sparsity.bar(height=[run.counts[n].group_sparsity for n in names], **bars)
        recall.bar(height=[run.counts[n].recall for n in names], **bars)
        mean = run.group_sparsity
        if run.ap is None or run.interval is None:
            accuracy.plot(mean, run.divergence, "o", color=colour, label=f"{name} {shown(run.divergence, '.2e')}")
            continue
        low, high = run.interval
        error = [[max(run.ap - low, 0)], [max(high - run.ap, 0)]]  # of few images, AP can be at or past an end
        accuracy.errorbar(mean, run.ap, error, fmt="o", capsize=4, color=colour, label=f"{name} {run.ap:.3f}")
    zeros = [dense.counts[n].zeros for n in names]
    sparsity.plot(position, zeros, "k_", markersize=24, label="zero activations, dense")
    inactive = [1 - dense.counts[n].groups_fired / dense.counts[n].groups for n in names]
    sparsity.plot(position, inactive, "k.", markersize=8, label="inactive groups, dense")
    sparsity.set_title("groups skipped")
    recall.set_title("recall: active groups that are computed")
    computed = [run.counts[n] for run in gated.values() for n in names]
    lowest = min(*inactive, *(c.group_sparsity for c in computed)), min(c.recall for c in computed)
    for axes, least in zip((sparsity, recall), lowest, strict=True):
        axes.set_ylim(max(0.0, np.floor(least * 10 - 1) / 10), 1)
        label_ffns(axes, names)
    figure.legend(*sparsity.get_legend_handles_labels(), fontsize=8, loc="outside lower left", ncols=4)
    accuracy.set(xlabel="mean share of groups skipped, all FFNs gated", title="divergence of the outputs from dense")
    if dense.ap is not None and dense.interval is not None:
        accuracy.axhline(dense.ap, color="k", linewidth=1, label=f"dense {dense.ap:.3f}")
        accuracy.axhspan(*dense.interval, color="k", alpha=0.08)
        accuracy.set_title("AP, 95 % intervals over images")
    accuracy.grid(alpha=0.3)
    accuracy.legend(fontsize=8)
    return figure


def plot_search(
    title: str, curves: Mapping[str, Mapping[str, Sequence[Row]]], plan: Row, ffns: Mapping[str, Row]
) -> Figure:
    """Accuracy of searched plans against time and density, and the selection of each FFN.

    `curves` have, by budget ("latency" or "density") and kinds of candidates, points with `time` and `density` relative
    to the dense FFNs, `AP_minus_dense` and its interval; `plan` is such a point. `ffns` have the `kind` and
    `density` of each FFN in the plan.
    """
    figure, (by_time, by_density, layers) = new_figure(title, (15, 4.4), 1, 3)
    for axes, unit, key in ((by_time, "latency", "time"), (by_density, "density", "density")):
        styles = (("tab:green", "o-"), ("tab:blue", "s--"), ("tab:orange", "^:"))
        for (name, points), (colour, line) in zip(curves[unit].items(), styles, strict=False):
            points = sorted(points, key=lambda point: point[key])
            x, y = [point[key] for point in points], [100 * point["AP_minus_dense"] for point in points]
            bounds = 100 * np.array([point["AP_minus_dense_interval"] for point in points]).reshape(-1, 2).T
            axes.plot(x, y, line, markersize=4, color=colour, label=name)
            axes.fill_between(x, *bounds, color=colour, alpha=0.15, linewidth=0)
        axes.plot(plan[key], 100 * plan["AP_minus_dense"], "k*", markersize=13, label="the plan")
        axes.axhline(0, color="0.7", linewidth=1)
        axes.grid(alpha=0.3)
    lost = [100 * point["AP_minus_dense"] for of in curves.values() for points in of.values() for point in points]
    by_time.set(xlabel="measured time of all FFNs, dense = 1", xlim=(0, None), ylabel="points of AP against dense")
    by_time.set(ylim=(max(min(lost, default=0), -12) - 1, 1))
    by_density.set(xlabel="share of the neurons that is computed", xlim=(0, None), ylim=by_time.get_ylim())
    by_time.legend()

    for i, ffn in enumerate(ffns.values()):
        layers.bar(i, ffn["density"], color=KIND_COLOURS[ffn["kind"]])
    for kind in dict.fromkeys(ffn["kind"] for ffn in ffns.values()):
        layers.bar(0, 0, color=KIND_COLOURS[kind], label=kind)
    label_ffns(layers, list(ffns))
    layers.set(ylabel="share of the neurons that the plan computes")
    layers.legend()
    return figure
