"""Figures of results."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from detr_jax.evaluation.counts import ActivityCounts
from detr_jax.files import replacing

matplotlib.use("Agg")
from matplotlib import pyplot as plt


@dataclass(frozen=True)
class GatedRun:
    """One way of running a detector, as a figure shows it.

    Attributes:
        title: what was done, a few words.
        ap: COCO's AP.
        ap_interval: its 95 % confidence interval.
        counts: of every FFN by name.
    """

    title: str
    ap: float
    ap_interval: tuple[float, float]
    counts: dict[str, ActivityCounts]


def plot_gates(path: Path, title: str, dense: GatedRun, gated: list[GatedRun]) -> None:
    """Sparsity and recall of every FFN, and AP against the sparsity that it was bought with.

    Args:
        path: of the figure, a PNG.
        title: detector, data and number of images.
        dense: the detector without gates.
        gated: with all FFNs gated, in several ways.
    """
    figure, (sparsity, recall, accuracy) = plt.subplots(
        1, 3, figsize=(15, 4.8), width_ratios=(1.3, 1.3, 1), layout="constrained"
    )
    names = list(dense.counts)
    position = np.arange(len(names))
    width = 0.8 / len(gated)
    colours = plt.get_cmap("tab10").colors
    for i, run in enumerate(gated):
        offset = position + (i - (len(gated) - 1) / 2) * width
        sparsity.bar(offset, [run.counts[n].group_sparsity for n in names], width, color=colours[i], label=run.title)
        recall.bar(offset, [run.counts[n].recall for n in names], width, color=colours[i], label=run.title)
    zeros = [dense.counts[n].zeros for n in names]
    sparsity.plot(position, zeros, "k_", markersize=24, label="activations that are zero, dense")
    silent = [1 - dense.counts[n].groups_fired / dense.counts[n].groups for n in names]
    sparsity.plot(position, silent, "k.", markersize=8, label="groups that are silent, dense")
    sparsity.set_title("groups skipped")
    recall.set_title("recall: firing groups that are computed")
    computed = [run.counts[n] for run in gated for n in names]
    for axes, least in (
        (sparsity, min(*silent, *(c.group_sparsity for c in computed))),
        (recall, min(c.recall for c in computed)),
    ):
        axes.set_ylim(max(0.0, np.floor(least * 10 - 1) / 10), 1)
        axes.set_xticks(position, names, rotation=60 if len(names) > 8 else 30, ha="right")
        axes.grid(axis="y", alpha=0.3)
    figure.legend(*sparsity.get_legend_handles_labels(), fontsize=8, loc="outside lower left", ncols=4)

    low, high = dense.ap_interval
    accuracy.axhline(dense.ap, color="k", linewidth=1, label=f"dense {dense.ap:.3f}")
    accuracy.axhspan(low, high, color="k", alpha=0.08)
    for i, run in enumerate(gated):
        mean = float(np.mean([c.group_sparsity for c in run.counts.values()]))
        low, high = run.ap_interval
        error = [[max(run.ap - low, 0)], [max(high - run.ap, 0)]]  # of few images, AP can be at or past an end
        accuracy.errorbar(mean, run.ap, error, fmt="o", capsize=4, color=colours[i], label=f"{run.title} {run.ap:.3f}")
    accuracy.set_xlabel("mean group sparsity, all FFNs gated")
    accuracy.set_title("AP, 95 % intervals over images")
    accuracy.grid(alpha=0.3)
    accuracy.legend(fontsize=8)
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
