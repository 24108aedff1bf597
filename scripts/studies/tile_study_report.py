"""Tables and figures of the study of tiles and blocks."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from common import markdown_table
from matplotlib import colormaps
from matplotlib.figure import Figure
from tile_study import Measurement, Setting
from top_p import TopPPermutation

from detr_jax.viz.figures import new_figure

Measurements = Mapping[str, Mapping[Setting, Measurement]]
"""By FFN."""

FLOOR = 1e-3
"""Least error that figures show."""
LINES = {"raster": "-", "signature": "--"}
"""Line styles of the token orders."""


def parts_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Encoder and decoder apart; FFNs without such names are one part."""
    parts: dict[str, list[str]] = {}
    for name in names:
        part, dot, _ = name.partition(".")
        parts.setdefault(part if dot else "FFNs", []).append(name)
    return parts


def mean_of(measured: Measurements, names: Sequence[str]) -> dict[Setting, Measurement]:
    """The mean over FFNs that have the same settings."""
    return {
        setting: Measurement(
            *(float(np.mean([getattr(m, key) for m in many])) for key in ("firing", "holding", "making_up")),
            errors={share: float(np.mean([m.errors[share] for m in many])) for share in many[0].errors},
        )
        for setting in measured[names[0]]
        for many in [[measured[name][setting] for name in names]]
    }


def levels_of(settings: Iterable[Setting]) -> list[int | None]:
    """Sizes of tiles from small to large; None, whole images, comes last."""
    return sorted(dict.fromkeys(s.tile_size for s in settings), key=lambda size: size or np.inf)


def study_markdown(
    images: Mapping[str, int],
    where: Measurements,
    neuron_orders: Measurements,
    sections: Mapping[str, Mapping[int, TopPPermutation]],
    need_share: float,
) -> str:
    """The tables.

    Args:
        images: number of images by what they were for.
        where: with one order of the neurons.
        neuron_orders: with the tokens in raster order.
        sections: of each FFN the orders by need, by block size.
        need_share: of a tile's contribution, what "nearly all" of it is.
    """
    nearly = f"{100 * need_share:g} %"
    some = next(iter(next(iter(where.values())).values()))
    middle = sorted(some.errors)[len(some.errors) // 2]
    error = _error_title(middle)
    parts = [
        f"{images['fit']} images for the orders of the neurons, {images['test']} others to measure. A neuron "
        "contributes the sum over a tile's tokens of h_j ||W_out[j]||. Errors are ||y_sparse - y|| / ||y|| of an FFN's "
        "output without b_out, each FFN for itself.",
        "## Where it goes",
        "Columns are tokens per tile. Tiles are consecutive tokens: row by row (raster), or sorted by the blocks that "
        "are active for a token (signature). Blocks larger than one neuron are of neurons in the order by top-p mask.",
    ]
    by_part = parts_of(where)
    for part, names in by_part.items():
        mean = mean_of(where, names)
        title = f"{part}, mean of {len(names)} FFNs"
        quantities: dict[str, Callable[[Measurement], float]] = {
            "density of exact firing": lambda m: m.firing,
            f"density of blocks that make up {nearly}": lambda m: m.making_up,
        }
        quantities |= {_error_title(share): lambda m, share=share: m.errors[share] for share in some.errors}
        for quantity, value in quantities.items():
            cells = _by_level(mean, lambda m, value=value: f"{value(m):.3f}")
            parts += [f"### {title}: {quantity}", cells]
    parts += [
        "## Where it goes, FFN by FFN",
        f"In each cell: density of exact firing, density of blocks that make up {nearly}, and {error}.",
    ]
    for name, measured in where.items():
        cells = _by_level(measured, lambda m: f"{m.firing:.2f} {m.making_up:.2f} {m.errors[middle]:.3f}")
        parts += [f"### {name}", cells]
    parts += [
        "## Orders of the neurons",
        f"In each cell: density of the pairs of tile and block that hold a neuron among those that make up {nearly} of "
        f"the tile's contribution, density of blocks that make up {nearly}, and {error}. Tokens in raster order.",
    ]
    for part, names in by_part.items():
        mean = mean_of(neuron_orders, names)
        levels = levels_of(mean)
        rows = []
        for block, order in sorted(dict.fromkeys((s.block_size, s.neurons) for s in mean), key=lambda pair: pair[0]):
            found = [mean[Setting(order, block, "raster", size)] for size in levels]
            cells = [f"{m.holding:.3f} {m.making_up:.3f} {m.errors[middle]:.3f}" for m in found]
            rows.append([f"blocks of {block}, {order}", *cells])
        parts += [f"### {part}, mean of {len(names)} FFNs", markdown_table(["", *map(_level, levels)], rows, left=1)]
    rows = [
        [name, *(f"{o.always} + {o.gated} + {o.never}" for o in orders.values())] for name, orders in sections.items()
    ]
    sizes = [f"blocks of {size}" for size in next(iter(sections.values()))]
    parts += ["### Sections by need: always + gated + never", markdown_table(["", *sizes], rows, left=1)]
    return "\n\n".join(parts)


def _error_title(share: float) -> str:
    return f"error, best {100 * share:g} % of the blocks of each tile"


def _block(size: int) -> str:
    return "neurons" if size == 1 else f"blocks of {size}"


def _level(size: int | None) -> str:
    return "image" if size is None else str(size)


def _by_level(measured: Mapping[Setting, Measurement], cell: Callable[[Measurement], str]) -> str:
    """A row for each block size and order of the tokens; what knows no order stands in all rows of a block size."""
    levels = levels_of(measured)
    rows = []
    for block, neurons in dict.fromkeys((s.block_size, s.neurons) for s in measured):
        for order in dict.fromkeys(s.tokens for s in measured):
            found = [_find(measured, neurons, block, order, size) for size in levels]
            rows.append([f"{_block(block)}, {order}", *map(cell, found)])
    return markdown_table(["", *map(_level, levels)], rows, left=1)


def _find(
    measured: Mapping[Setting, Measurement], neurons: str, block_size: int, tokens: str, tile_size: int | None
) -> Measurement:
    setting = Setting(neurons, block_size, tokens, tile_size)
    return measured[setting if setting in measured else Setting(neurons, block_size, "raster", tile_size)]


def plot_where(title: str, where: Measurements, need_share: float) -> Figure:
    """Densities and error against tokens per tile, a row of panels for each part of the model.

    Args:
        title: data and number of images.
        where: with one order of the neurons.
        need_share: of a tile's contribution, what "nearly all" of it is.
    """
    parts = parts_of(where)
    least = min(next(iter(next(iter(where.values())).values())).errors)
    columns: dict[str, Callable[[Measurement], float]] = {
        "density of exact firing": lambda m: m.firing,
        f"density of blocks that make up {100 * need_share:g} %": lambda m: m.making_up,
        f"error, best {100 * least:g} % of the blocks": lambda m: max(m.errors[least], FLOOR),
    }
    figure, panels = new_figure(title, (16, 4.2 * len(parts) + 0.6), len(parts), 3, squeeze=False)
    for row, (part, names) in zip(panels, parts.items(), strict=True):
        mean = mean_of(where, names)
        levels = levels_of(mean)
        blocks = dict.fromkeys((s.block_size, s.neurons) for s in mean)
        colours = colormaps["viridis"](np.linspace(0, 0.9, len(blocks)))
        for axes, (label, value) in zip(row, columns.items(), strict=True):
            for (block, neurons), colour in zip(blocks, colours, strict=True):
                for order in dict.fromkeys(s.tokens for s in mean):
                    values = [value(_find(mean, neurons, block, order, size)) for size in levels]
                    of_blocks, in_order = _block(block), f"tokens in {order} order"
                    axes.plot(values, LINES[order], color=colour, marker="o", markersize=3)
                    # Colours and lines are explained once each.
                    axes.plot([], color=colour, label=of_blocks)
                    axes.plot([], LINES[order], color="black", label=in_order)
            axes.set_xticks(range(len(levels)), list(map(_level, levels)))
            axes.set(title=f"{part}: {label}", xlabel="tokens per tile", ylim=(0, 1.02))
            axes.grid(alpha=0.3)
        row[-1].set(yscale="log", ylim=(FLOOR, 1))
    explained = {
        text: handle for axes in panels.flat for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    texts = sorted(explained, key=lambda text: text.startswith("tokens"))
    figure.legend([explained[text] for text in texts], texts, fontsize=8, loc="outside right center")
    return figure


def plot_neuron_orders(title: str, neuron_orders: Measurements, need_share: float) -> Figure:
    """Density of needed pairs for each order of the neurons, a row of panels for each part of the model.

    Args:
        title: data and number of images.
        neuron_orders: with the tokens in raster order.
        need_share: of a tile's contribution, what "nearly all" of it is.
    """
    parts = parts_of(neuron_orders)
    levels = levels_of(s for measured in neuron_orders.values() for s in measured)
    title = f"Pairs with a neuron needed for {100 * need_share:g} % of a tile's contribution\n{title}"
    size = (4.4 * len(levels) + 2, 3.8 * len(parts) + 0.6)
    figure, panels = new_figure(title, size, len(parts), len(levels), sharey=True, squeeze=False)
    for row, (part, names) in zip(panels, parts.items(), strict=True):
        mean = mean_of(neuron_orders, names)
        orders = list(dict.fromkeys(s.neurons for s in mean))
        blocks = list(dict.fromkeys(s.block_size for s in mean))
        for axes, level in zip(row, levels, strict=True):
            axes.set_title(f"{part}, {'whole images' if level is None else f'tiles of {level}'}")
            axes.grid(axis="y", alpha=0.3)
            axes.set_xticks(range(len(blocks)), [f"blocks of {block}" for block in blocks])
            if level not in levels_of(mean):
                axes.set_visible(False)
                continue
            width = 0.85 / len(orders)
            for i, order in enumerate(orders):
                values = [mean[Setting(order, block, "raster", level)].holding for block in blocks]
                axes.bar(np.arange(len(blocks)) + (i - (len(orders) - 1) / 2) * width, values, width, label=order)
        row[0].set_ylabel("density")
    figure.legend(*panels[0][-1].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    return figure
