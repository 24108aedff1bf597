"""What a benchmark of the sparse FFN found, in words and as a table."""

from typing import Any

from detr_jax.viz.tables import table


def break_even(rows: list[dict[str, Any]], name: str, ffn: dict[str, Any]) -> list[dict[str, Any]]:
    """For each size of tiles and number of tokens, the highest density that was measured up to which an implementation
    is nowhere slower than dense; as `dispatch.break_even` reads it, with the facts of the FFN that all rows share."""
    by_size: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in rows:
        by_size.setdefault((row["tile_size"], row["tokens"]), []).append(row)
    return [
        {"tile_size": tile_size, "tokens": tokens, **ffn, "density": _break_even(some, name)}
        for (tile_size, tokens), some in sorted(by_size.items())
    ]


def _break_even(rows: list[dict[str, Any]], name: str) -> float:
    slower = [row["density"] for row in rows if row["faster_than_dense"][name] < 1]
    # Tiles meet the densities that are asked for only about.
    limit = min(slower, default=2.0) - 0.02
    return max([row["density"] for row in rows if row["density"] < limit], default=0.0)


def report(results: dict[str, Any]) -> str:
    """What scripts/benchmarks/sparse_kernels.py writes, for people: the table, then what follows from it."""
    arguments, top = results["arguments"], results["ceilings"]
    errors = ", ".join(f"{name} {error:.1e}" for name, error in results["errors"].items())
    lines = [f"\nlargest relative errors: {errors or 'not compared'}"]
    if top:
        lines.append(
            f"ceilings: {top['flops_per_second'] / 1e12:.3g} TFLOP/s in a product, "
            f"{top['bytes_per_second'] / 1e9:.3g} GB/s in an elementwise operation, by the {top['clock']}'s clock"
        )
    lines += [f"left out, because the time was up: {_words(row)}" for row in results["left_out"]]
    if results["rows"]:
        lines.append(
            f"\nTimes as fast as XLA's dense FFN, {arguments['dtype']}, blocks of {arguments['block_size']} neurons, "
            f"{results['device']};\nthe gate, lists and gather included; auto by the host's clock, % of ceilings"
        )
        lines.append(_table(results["rows"], top))
    for name, entries in results["break_even"].items():
        lines += [f"break-even density: {name}, {_words(entry)}" for entry in entries]
    return "\n".join(lines)


def _words(entry: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in entry.items() if value is not None)


def _table(rows: list[dict[str, Any]], top: dict[str, Any]) -> str:
    names, timed = list(rows[0]["faster_than_dense"]), list(rows[0]["flops_per_second"])
    header = (
        *("tokens", "tile", "correlation", "gate", "order", "gate density", "density", "clock", "dense ms"),
        *(f"{name} x" for name in names),
        *(f"{name} {unit}" for name in timed for unit in ("TFLOP/s", "%", "GB/s", "%")),
    )

    def rates(row, name):
        flops, moved = row["flops_per_second"][name], row["bytes_per_second"][name]
        yield from (flops / 1e12, round(100 * flops / top["flops_per_second"]))
        yield from (round(moved / 1e9, 1), round(100 * moved / top["bytes_per_second"]))

    lines = [
        (
            *(row["tokens"], row["tile_size"], "common" if row["correlation"] is None else f"{row['correlation']:g}"),
            *(row["gate"], row["order"], row["gate_density"], row["density"], row["clock"]),
            *(1e3 * row["medians"]["dense"], *(row["faster_than_dense"][name] for name in names)),
            *(rate for name in timed for rate in rates(row, name)),
        )
        for row in rows
    ]
    return table(header, lines)
