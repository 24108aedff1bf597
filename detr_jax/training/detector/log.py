"""The log of a training: mean losses over time, as lines of JSON that a killed and resumed run continues."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from detr_jax.files import replacing

LOSSES = ("detection", "dense", "hoyer")


def read_log(path: Path) -> list[dict[str, float]]:
    """The entries in order of their steps; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]


class TrainingLog:
    """Appends the mean losses of every so many steps to a file.

    An entry has `step`, the number of steps taken; the mean of each loss since the entry before, or since the
    checkpoint from which the run went on; and `minutes` of training, without the time that a kill took away.

    Args:
        path: of the file; entries past the step that the run goes on from are dropped.
        steps: of the whole training; the last one always makes an entry.
        interval: steps between entries.
    """

    def __init__(self, path: Path, steps: int, interval: int = 100):
        self.path = path
        self._steps = steps
        self._interval = interval
        self._losses: list[Mapping[str, float]] = []
        self._earlier: float | None = None
        self._clock = time.perf_counter()

    def record(self, step: int, losses: Mapping[str, float]) -> dict[str, float] | None:
        """Takes the losses of a step, counted from 0; returns the entry if one was written."""
        if self._earlier is None:
            self._earlier = self._go_on_from(step)
        self._losses.append(losses)
        taken = step + 1
        if taken % self._interval and taken != self._steps:
            return None
        entry: dict[str, float] = {"step": taken}
        entry |= {name: float(np.mean([each[name] for each in self._losses])) for name in losses}
        entry["minutes"] = self._earlier + (time.perf_counter() - self._clock) / 60
        self._losses.clear()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        return entry

    def _go_on_from(self, step: int) -> float:
        """Drops entries past `step`; returns the minutes that the rest took."""
        kept = [entry for entry in read_log(self.path) if entry["step"] <= step]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        return kept[-1]["minutes"] if kept else 0.0


def plot_log(entries: list[dict[str, float]], path: Path) -> None:
    """Draws each loss over the steps."""
    titles = {
        "detection": "set loss, all decoder layers",
        "dense": "dense loss on encoder tokens",
        "hoyer": "Hoyer-square of activations",
    }
    steps = [entry["step"] for entry in entries]
    plot_curves({titles[loss]: (steps, [entry[loss] for entry in entries]) for loss in LOSSES}, path)


def plot_curves(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path) -> None:
    """Draws curves over the steps, (steps, values) by title, one below the other."""
    figure = Figure(figsize=(7, 1 + 2 * len(curves)), layout="constrained")
    panels = figure.subplots(len(curves), sharex=True)
    for panel, (title, curve) in zip(panels, curves.items(), strict=True):
        marker = "o" if len(curve[0]) == 1 else ""  # a line of one point shows nothing
        panel.plot(*curve, color="#0b5fa5", linewidth=1.5, marker=marker)
        panel.set_title(title, loc="left", fontsize=11)
        panel.set_ylim(bottom=0)
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("step")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
