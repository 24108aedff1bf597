"""Prints the table of methods in docs/methods.md."""

from collections.abc import Iterable

from detr_jax.methods import METHODS, Method

_COLUMNS = ("name", "class", "decides about", "saves", "needs", "source")


def methods_table(methods: Iterable[type[Method]] | None = None) -> str:
    """A markdown table of some methods, by default of all that are registered, sorted by name."""
    rows = [_COLUMNS, ("---",) * len(_COLUMNS)]
    for method in sorted(METHODS.values() if methods is None else methods, key=lambda method: method.name):
        decides = method.decides if method.dynamic else f"{method.decides}, once for all"
        needs = ", ".join(sorted(method.requires)).replace("_", " ") or "-"
        saves = {"both": "both products", "first": "the first product", "second": "the second product"}[method.saves]
        rows.append((f"`{method.name}`", f"`{method.__name__}`", decides, saves, needs, method.paper))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(methods_table())
