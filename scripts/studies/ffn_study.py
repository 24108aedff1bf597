"""FFNs that are given as arrays with samples of their inputs: reading them, and what sparsity does to each alone."""

import itertools
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from common import markdown_table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from standalone import FFNInputs, StandaloneFFNs

from detr_jax.errors import InputError, MissingFileError
from detr_jax.evaluation.counts import count_activity, total_counts
from detr_jax.evaluation.flops import remaining_share
from detr_jax.methods import Fixed, IndicatorSelector, LowRankCompensation, Oracle, Thresholded, TopK
from detr_jax.models import FFNWeights, Selection
from detr_jax.models.base import HasFFNs
from detr_jax.models.ffn import forward
from detr_jax.viz.figures import COLOURS, new_figure

MeasuredSelector = Thresholded | TopK | LowRankCompensation | Fixed | Oracle | IndicatorSelector
"""Selectors that know what they cost."""

Densities = dict[str, dict[int, float]]
"""By order of the tokens and tokens per tile, see `tile_density.measure_tiles`."""

_KEY = re.compile(r"layer(\d+)\.(w1|b1|w2|b2|x)")


def read_ffns(path: Path) -> tuple[StandaloneFFNs, FFNInputs]:
    """Reads FFNs and samples of their inputs from an .npz archive.

    Its arrays, for L = 0, 1, ...: layerL.w1 (F, d) and layerL.b1 (F,), layerL.w2 (d, F) as torch has it, layerL.b2 (d,)
    or nothing where it is zero, and layerL.x (images, tokens, d). F, d and tokens may differ between FFNs.

    Returns:
        the FFNs by name ("layer0"), and their inputs, all float32.

    Raises:
        MissingFileError: if there is no such file.
        ValueError: if it is no such archive, or an array is missing, misshapen, not of floating-point numbers, or not
            finite.
    """
    arrays = _read(path)
    if unknown := [key for key in arrays if not _KEY.fullmatch(key)]:
        raise InputError(f"{path}: {unknown[0]} is not an array of an FFN; those are layer0.w1, .b1, .w2, .b2, .x")
    layers = sorted({int(_KEY.fullmatch(key)[1]) for key in arrays})
    if not layers:
        raise InputError(f"{path} holds no arrays; layer0.w1, .b1, .w2, .b2 and .x are an FFN")
    weights, x = {}, {}
    for layer in layers:
        name = f"layer{layer}"
        weights[name], x[name] = _ffn(path, name, arrays)
    first, *others = x
    for name in others:
        if len(x[name]) != len(x[first]):
            raise InputError(f"{path}: {name}.x has {len(x[name])} images, {first}.x has {len(x[first])}")
    tokens = {name: jnp.ones(values.shape[:2], bool) for name, values in x.items()}
    return StandaloneFFNs(weights), FFNInputs(x, tokens)


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        raise MissingFileError(f"{path} does not exist")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is no .npz archive of arrays, or is damaged: {error}") from error


def _ffn(path: Path, name: str, arrays: Mapping[str, np.ndarray]) -> tuple[FFNWeights, jax.Array]:
    """One FFN and its inputs, checked."""

    def take(key: str, letters: str, sizes: Mapping[str, int]) -> jax.Array:
        if (key := f"{name}.{key}") not in arrays:
            raise InputError(f"{path}: {key} is missing")
        array = arrays[key]
        expected = [sizes.get(letter, letter) for letter in letters.split()]
        fits = [size == wanted or isinstance(wanted, str) for size, wanted in zip(array.shape, expected, strict=False)]
        if array.ndim != len(expected) or not all(fits):
            raise InputError(f"{path}: {key} has the shape {array.shape}, should be ({', '.join(map(str, expected))})")
        if not np.issubdtype(array.dtype, np.floating) or not array.size:
            raise InputError(f"{path}: {key} should hold floating-point numbers, has {array.size} of {array.dtype}")
        if not np.isfinite(array).all():
            raise InputError(f"{path}: {key} holds NaN or infinite values")
        return jnp.asarray(array, jnp.float32)

    w_in = take("w1", "F d", {})
    sizes = dict(zip("Fd", w_in.shape, strict=True))
    b_out = take("b2", "d", sizes) if f"{name}.b2" in arrays else jnp.zeros(sizes["d"])
    weights = FFNWeights(w_in, take("b1", "F", sizes), take("w2", "d F", sizes).T, b_out)
    return weights, take("x", "images tokens d", sizes)


def image_batches(inputs: FFNInputs, images: range, batch_size: int) -> list[FFNInputs]:
    """Inputs of consecutive images in batches; the last one may be smaller."""
    starts = range(images.start, images.stop, batch_size)
    parts = [slice(start, min(start + batch_size, images.stop)) for start in starts]
    return [jax.tree.map(lambda array, part=part: array[part], inputs) for part in parts]


@dataclass(frozen=True)
class Effect:
    """What a selector does to one FFN.

    Attributes:
        error: relative error of the output, ||y_sparse - y|| / ||y|| without b_out, over all tokens.
        density: share of what the selector decides about, hidden neurons or channels of the input, that is computed.
        share: what is left of the multiply-adds, the selector's own included.
    """

    error: float
    density: float
    share: float


Effects = Mapping[str, Mapping[str, Mapping[str, Effect]]]
"""Of each FFN, by method and setting."""


def measure_effects(
    model: HasFFNs, batches: Iterable[FFNInputs], selectors: Mapping[str, MeasuredSelector]
) -> dict[str, Effect]:
    """Measures what a selector of each FFN does to its output.

    Args:
        model: the FFNs.
        batches: inputs.
        selectors: of every FFN by name.

    Returns:
        the effect on each FFN by name.
    """
    measured = [jax.device_get(_effects(model, batch, dict(selectors))) for batch in batches]
    counts = total_counts({name: counts for name, (_, counts) in batch.items()} for batch in measured)
    effects = {}
    for name, weights in model.ffn_weights().items():
        error, output = np.sum([batch[name][0] for batch in measured], axis=0, dtype=np.float64)
        features, d_model = weights.w_in.shape
        selector, counted = selectors[name], counts[name]
        effects[name] = Effect(
            error=float(np.sqrt(error / max(output, np.finfo(np.float64).tiny))),  # a silent FFN has no error
            density=float(counted.density * counted.channel_density),
            share=remaining_share(selector.traits, selector.cost(d_model, features), counted, d_model, features),
        )
    return effects


@jax.jit
def _effects(model, batch, selectors):
    """Of each FFN the sums of squares of error and output, and the counts."""
    weights = model.ffn_weights()

    def effect(name, trace):
        dense, sparse = (forward(weights[name], trace.inputs, chosen) for chosen in (Selection(), trace.selection))
        squares = jnp.stack([(sparse - dense) ** 2, (dense - weights[name].b_out) ** 2])
        return jnp.where(trace.tokens[..., None], squares, 0).sum((1, 2, 3)), count_activity(trace, 1)

    return {name: effect(name, trace) for name, trace in model.traces(batch, selectors).items()}


def study_markdown(
    images: Mapping[str, int],
    basics: Mapping[str, Mapping[str, float]],
    sets: Mapping[str, Mapping[str, Mapping[str, float]]],
    tiles: Mapping[str, Mapping[str, Densities]],
    effects: Effects,
) -> str:
    """The tables of a study.

    Args:
        images: number of images by what they were for.
        basics: by what was measured, of each FFN.
        sets: by share of the neurons and how they are chosen, of each FFN the error; "best, ..." is the bound of the
            rows that decide for as many tokens.
        tiles: of each FFN, by how its neurons are grouped.
        effects: of the selectors; those with the settings of the last method share a table, the others have another.
    """
    names = list(effects)
    parts = [
        f"{images['calibration']} images to calibrate and to train gates on, {images['test']} others to test on. Gates "
        "see few inputs here, and thresholds are calibrated on those that the gates were trained on, so that densities "
        "on the test images are not quite those aimed at.",
        "## What a part of the neurons leaves of the output",
        "Errors are ||y_sparse - y|| / ||y|| of the output without b2. Neurons are chosen by the sum over tokens of "
        "h_j ||W2[j]||: a fixed set on the calibration images, the best ones on the image or window itself. Neurons "
        "that never fire there are in no set, even if it becomes smaller than the share says.",
        markdown_table(["", *names], [[t, *(f"{v:.3f}" for v in row.values())] for t, row in basics.items()], left=1),
        "## Sets of neurons that many tokens share",
        "Errors as above. The sketch guesses what neurons contribute from a product of low rank in place of the first "
        "one, fitted to the covariance of the inputs. The last column is how much of the way"
        "  from the fixed set to the best one of that granularity a row goes, by the mean error.",
        *(_sets_table(share, of_share, names) for share, of_share in sets.items()),
        "## Density of exact firing",
        "Share of the pairs of token tile and group in which a neuron fires, by tokens per tile, with the tokens in "
        "the order in which they come (raster) and in the order of their signatures.",
    ]
    for name, groupings in tiles.items():
        rows = [
            [f"{grouping}, {order}", *(f"{density:.2f}" for density in by_size.values())]
            for grouping, orders in groupings.items()
            for order, by_size in orders.items()
        ]
        sizes = list(next(iter(next(iter(groupings.values())).values())))
        parts += [f"### {name}", markdown_table(["", *map(str, sizes)], rows, left=1)]
    parts += [
        "## Selectors",
        "In each cell: error, density on the test images, and share of the multiply-adds that is left, the selector's "
        "own included. Columns are the densities aimed at.",
    ]
    by_method = effects[names[0]]
    columns = list(by_method[list(by_method)[-1]])
    alike = [method for method, settings in by_method.items() if list(settings) == columns]
    mean = {m: {c: _mean([effects[name][m][c] for name in names]) for c in columns} for m in alike}
    for title, of_methods in {"mean of the FFNs": mean, **effects}.items():
        rows = [[method, *map(_cell, of_methods[method].values())] for method in alike]
        parts += [f"### {title}", markdown_table(["", *columns], rows, left=1)]
    rows = [
        [f"{method}, {setting}", *(_cell(effects[name][method][setting]) for name in names)]
        for method, settings in by_method.items()
        if method not in alike
        for setting in settings
    ]
    parts += ["### Selectors without a density to aim at", markdown_table(["", *names], rows, left=1)]
    return "\n\n".join(parts)


def _sets_table(share: str, errors: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> str:
    means = {title: float(np.mean(list(row.values()))) for title, row in errors.items()}

    def way(title: str) -> str:
        bound = f"best, {title.partition(', ')[2]}"
        if bound not in means:
            return ""
        return f"{(means['fixed'] - means[title]) / max(means['fixed'] - means[bound], FLOOR**2):.2f}"

    rows = [
        [title, *(f"{row[name]:.3f}" for name in names), f"{means[title]:.3f}", way(title)]
        for title, row in errors.items()
    ]
    return markdown_table([f"{100 * float(share):g} % of the neurons", *names, "mean", "way"], rows, left=1)


def _cell(effect: Effect) -> str:
    return f"{effect.error:.3f} {effect.density:.2f} {effect.share:.2f}"


def _mean(effects: Sequence[Effect]) -> Effect:
    return Effect(*np.mean([(e.error, e.density, e.share) for e in effects], axis=0).tolist())


FLOOR = 1e-3
"""Least error that the figure shows."""


def plot_errors(title: str, effects: Effects) -> Figure:
    """Error against share of multiply-adds, a panel for each FFN.

    Args:
        title: data and number of images.
        effects: of the selectors; one without error is a vertical line. Methods whose names begin with the same word
            ("teal-input") share a colour.
    """
    figure, panels = _panels(len(effects), title)
    styles = _styles(list(next(iter(effects.values()))))
    for axes, (name, of_methods) in zip(panels, effects.items(), strict=False):
        for method, settings in of_methods.items():
            points = sorted((effect.share, max(effect.error, FLOOR)) for effect in settings.values())
            if any(effect.error for effect in settings.values()):
                axes.plot(*zip(*points, strict=True), **styles[method], markersize=4, label=method)
            else:
                axes.axvline(points[0][0], **styles[method] | {"marker": ""}, label=method)
        axes.set(title=name, yscale="log", xlim=(0, 1), ylim=(FLOOR, 1.5))
    return _finish(figure, panels, "share of multiply-adds, selector included", "relative error of the output")


def _styles(methods: Sequence[str]) -> dict[str, dict]:
    """Of each method its colour, and line and marker of its variant."""
    colours = [*COLOURS, "black", "gold", "navy", "lime"]
    families = [re.split("[,-]", method)[0] for method in methods]
    colour = dict(zip(dict.fromkeys(families), itertools.cycle(colours), strict=False))
    variants = [families[:i].count(family) % 4 for i, family in enumerate(families)]
    return {
        method: {"color": colour[family], "linestyle": ("-", "--", ":", "-.")[variant], "marker": "osD^"[variant]}
        for method, family, variant in zip(methods, families, variants, strict=True)
    }


def plot_tiles(title: str, densities: Mapping[str, Mapping[str, Densities]]) -> Figure:
    """Density against tokens per tile, a panel for each FFN.

    Args:
        title: data and number of images.
        densities: of each FFN, by how its neurons are grouped, in two orders of the tokens.
    """
    figure, panels = _panels(len(densities), title)
    for axes, (name, of_groupings) in zip(panels, densities.items(), strict=False):
        for colour, (grouping, found) in zip(COLOURS, of_groupings.items(), strict=False):
            for (order, by_size), line in zip(found.items(), ("-", "--"), strict=True):
                sizes, values = zip(*by_size.items(), strict=True)
                axes.plot(sizes, values, line, marker="o", markersize=4, color=colour, label=f"{grouping}, {order}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, map(str, sizes))
        axes.set(title=name, ylim=(0, 1.02))
    return _finish(figure, panels, "tokens per tile, in raster or signature order", "density of (tile, group) pairs")


def _panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    """A figure with that many panels, up to three in a row."""
    columns = min(count, 3)
    rows = -(-count // columns)
    size = (4.2 * columns + 2.5, 3.6 * rows + 0.6)
    figure, grid = new_figure(title, size, rows, columns, sharey=True, squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    return figure, list(grid.flat[:count])


def _finish(figure: Figure, panels: Sequence[Axes], x_label: str, y_label: str) -> Figure:
    """Adds labels, grids and the legend of one panel."""
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.label_outer(remove_inner_ticks=False)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside right center", handlelength=3.5)
    return figure
