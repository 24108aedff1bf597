"""Tables for people: aligned columns, numbers to the right."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from detr_jax.evaluation.comparison import Row
from detr_jax.evaluation.counts import ActivityCounts

Cell = str | float | int
_NUMBER = re.compile(r"\[?[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?\b", re.IGNORECASE)
"""Begins a cell that has a value to sort by, as in the script of `detr_jax.viz.report`."""
_BLANK = ("", "-")


@dataclass(frozen=True)
class Table:
    """Rows under a header; prints as aligned text, text to the left.

    Attributes:
        header: titles of the columns.
        rows: cells; floats get three decimals.
        total: a row that stays last when the others are sorted, such as their mean.

    Raises:
        ValueError: if a row has not as many cells as the header.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    total: Sequence[Cell] = ()

    def __post_init__(self) -> None:
        for row in self._all_rows:
            if len(row) != len(self.header):
                raise ValueError(f"a row has {len(row)} cells under a header of {len(self.header)}: {row}")

    @property
    def _all_rows(self) -> list[Sequence[Cell]]:
        return [*self.rows, *([self.total] if self.total else [])]

    @property
    def text(self) -> list[list[str]]:
        """The cells of all rows, the total last."""
        return [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in self._all_rows]

    @property
    def numeric(self) -> list[bool]:
        """For each column whether its cells begin with numbers, those aside that are blank."""
        columns = ([row[i] for row in self.text] for i in range(len(self.header)))
        return [all(_NUMBER.match(cell) or cell in _BLANK for cell in column) for column in columns]

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.text, strict=True)]
        aligned = ["<" if self.rows and isinstance(self.rows[0][i], str) else ">" for i in range(len(self.header))]
        line = "  ".join(f"{{:{side}{width}}}" for side, width in zip(aligned, widths, strict=True))
        lines = [self.header, ["-" * width for width in widths], *self.text]
        return "\n".join(line.format(*cells).rstrip() for cells in lines)


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A `Table` as text."""
    return str(Table(header, rows))


def gate_table(counts: Mapping[str, ActivityCounts], thresholds: Mapping[str, float | None]) -> Table:
    """What the gates of each FFN find and skip, the mean over the FFNs last; thresholds where all have one."""
    found = {name: threshold for name, threshold in thresholds.items() if threshold is not None}
    columns = ["threshold"] if len(found) == len(counts) else []
    columns += ["recall", "precision", "group sparsity", "neuron sparsity", "zeros"]
    values = [
        [found[name] if column == "threshold" else getattr(c, column.replace(" ", "_")) for column in columns]
        for name, c in counts.items()
    ]
    mean = [sum(column) / len(values) for column in zip(*values, strict=True)]
    rows = [[name, *row] for name, row in zip(counts, values, strict=True)]
    return Table(["FFN", *columns], rows, total=["mean", *mean])


def points_of_ap(row: Row) -> str:
    """`AP_minus_dense` of a row in points, hundredths, with its interval."""
    low, high = (100 * bound for bound in row["AP_minus_dense_interval"])
    return f"{100 * row['AP_minus_dense']:+.2f} [{low:+.2f}, {high:+.2f}]"
