"""Tables for people: aligned columns, numbers to the right."""

from collections.abc import Mapping, Sequence

from detr_jax.evaluation.comparison import Row
from detr_jax.evaluation.counts import ActivityCounts

Cell = str | float | int


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Rows under a header as aligned text; floats get three decimals, text is aligned to the left.

    Raises:
        ValueError: if a row has not as many cells as the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} cells under a header of {len(header)}: {row}")
    text = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *text, strict=True)]
    aligned = ["<" if rows and isinstance(rows[0][i], str) else ">" for i in range(len(header))]
    line = "  ".join(f"{{:{side}{width}}}" for side, width in zip(aligned, widths, strict=True))
    lines = [header, ["-" * width for width in widths], *text]
    return "\n".join(line.format(*cells).rstrip() for cells in lines)


def gate_table(counts: Mapping[str, ActivityCounts], thresholds: Mapping[str, float | None]) -> str:
    """What the gates of each FFN find and skip, the mean over the FFNs last; thresholds where all have one."""
    found = {name: threshold for name, threshold in thresholds.items() if threshold is not None}
    columns = ["threshold"] if len(found) == len(counts) else []
    columns += ["recall", "precision", "group sparsity", "neuron sparsity", "zeros"]
    values = [
        [found[name] if column == "threshold" else getattr(c, column.replace(" ", "_")) for column in columns]
        for name, c in counts.items()
    ]
    values.append([sum(column) / len(values) for column in zip(*values, strict=True)])
    return table(["FFN", *columns], [[name, *row] for name, row in zip([*counts, "mean"], values, strict=True)])


def points_of_ap(row: Row) -> str:
    """`AP_minus_dense` of a row in points, hundredths, with its interval."""
    low, high = (100 * bound for bound in row["AP_minus_dense_interval"])
    return f"{100 * row['AP_minus_dense']:+.2f} [{low:+.2f}, {high:+.2f}]"
