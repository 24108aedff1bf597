"""Tables for people: aligned columns, numbers to the right."""

from collections.abc import Mapping, Sequence

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
    text = [
        [cell if isinstance(cell, str) else f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in r]
        for r in rows
    ]
    widths = [max(len(cell) for cell in column) for column in zip(header, *text, strict=True)]
    left = [bool(rows) and isinstance(rows[0][i], str) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.ljust(width) if is_text else cell.rjust(width)
            for cell, width, is_text in zip(cells, widths, left, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, text)])


def gate_table(counts: dict[str, ActivityCounts], thresholds: dict[str, float]) -> str:
    """What the gates of each FFN find and skip, the mean over the FFNs last."""
    columns = ("threshold", "recall", "precision", "group sparsity", "neuron sparsity", "zeros")
    values = {
        name: [thresholds[name], c.recall, c.precision, c.group_sparsity, c.neuron_sparsity, c.zeros]
        for name, c in counts.items()
    }
    means = [sum(column) / len(values) for column in zip(*values.values(), strict=True)]
    return table(("FFN", *columns), [[name, *row] for name, row in values.items()] + [["mean", *means]])


def points_of_ap(row: Mapping) -> str:
    """`AP_minus_dense` of a row in points, hundredths, with its interval."""
    low, high = (100 * bound for bound in row["AP_minus_dense_interval"])
    return f"{100 * row['AP_minus_dense']:+.2f} [{low:+.2f}, {high:+.2f}]"
