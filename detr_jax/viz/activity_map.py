"""Heat maps of where on an image hidden units are active, and where a plan computes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from detr_jax.data.image_list import ImageLike, preprocess_images
from detr_jax.data.images import pixels
from detr_jax.evaluation.inspection import FFNActivity
from detr_jax.models.detections import ImageDetections
from detr_jax.viz.boxes import colour

if TYPE_CHECKING:
    from detr_jax.sparse import SparseDETR

_PANEL = 2.3
"""Width of one picture, in inches."""
_ACTIVE, _KEPT = "#d1495b", "#30638e"


def plot_activity(model: SparseDETR, image: ImageLike, threshold: float) -> Figure:
    """The detections in an image, heat maps of the FFNs whose tokens lie on a grid, and bars for all FFNs.

    The upper row shows the share of each token's hidden neurons that are active, the lower one the share that the plan
    keeps. Each row has one scale. Detections are drawn from a score of `threshold` on.
    """
    picture = pixels(image)
    pixel_values, pixel_mask = map(jnp.asarray, preprocess_images(picture, model.preprocessing))
    layers = {name: jax.device_get(layer) for name, layer in model.inspect(pixel_values, pixel_mask).items()}
    on_grid = [panel for name, layer in layers.items() for panel in _grid_panels(model, name, layer)]
    resized_height, resized_width = pixel_values.shape[1:3]
    height, width = picture.shape[:2]

    tall = min(max(height / width, 0.6), 1.6) * _PANEL
    figure = Figure(figsize=((1 + len(on_grid)) * _PANEL + 0.9, 2 * tall + 1.0), layout="constrained")
    axes = figure.subplots(2, 1 + len(on_grid))
    _draw_detections(axes[0, 0], picture, cast(ImageDetections, model.detect(picture, threshold)))
    _draw_densities(axes[1, 0], layers)

    # Without colours and the darkest tones, which are the heat's.
    grey = 0.2 + 0.8 * np.asarray(Image.fromarray(picture).convert("L"), np.float32) / 255
    for of_row, (row, label) in enumerate(zip(axes, ("active neurons", "kept neurons"), strict=True)):
        most = max(float(shares[of_row].max()) for _, _, shares in on_grid) or 1.0
        for panel, (name, stride, shares) in zip(row[1:], on_grid, strict=True):
            share = shares[of_row]
            rows, columns = share.shape
            # A token stands for `stride` pixels of the resized image; the last ones may reach beyond it.
            extent = (0, width * columns * stride / resized_width, height * rows * stride / resized_height, 0)
            panel.imshow(grey, extent=(0, width, height, 0), cmap="gray", vmin=0, vmax=1)
            heat = {"cmap": "inferno", "vmin": 0, "vmax": most, "alpha": 0.6, "interpolation": "nearest"}
            shown = panel.imshow(share, extent=extent, **heat)
            panel.set(xlim=(0, width), ylim=(height, 0))
            panel.set_title(f"{name}   {share.mean():.1%}", fontsize=10)
            panel.set_axis_off()
        bar = figure.colorbar(shown, ax=row[-1], format=lambda share, _: f"{share:.0%}", fraction=0.06)
        bar.set_label(f"{label}, per token", fontsize=9)
        if bar.solids is not None:
            bar.solids.set_alpha(1)
        bar.ax.tick_params(labelsize=8)
    return figure


def _grid_panels(model: SparseDETR, name: str, layer: FFNActivity) -> Iterator[tuple[str, int, list[np.ndarray]]]:
    """Of each token grid of an FFN a title, its stride, and the shares (rows, columns) that are active and kept."""
    indices = model.detector.ffn_specs()[name].grids
    shares = [np.asarray(which[0]).mean(-1) for which in (layer.fires, layer.kept & layer.tokens[..., None])]
    ends = np.cumsum([rows * columns for rows, columns in layer.grids])
    for index, grid, end in zip(indices, layer.grids, ends, strict=True):
        stride = model.detector.strides[index]
        tokens = slice(end - grid[0] * grid[1], end)
        title = name if len(indices) == 1 else f"{name}, stride {stride}"
        yield title, stride, [share[tokens].reshape(grid) for share in shares]


def _draw_detections(panel: Axes, picture: np.ndarray, found: ImageDetections) -> None:
    panel.imshow(picture)
    for (x0, y0, x1, y1), label, name in zip(found.boxes.tolist(), found.labels.tolist(), found.names, strict=True):
        fill = np.array(colour(label)) / 255
        panel.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=fill, linewidth=1.5))
        y, side = (y0, "bottom") if y0 > 0.08 * len(picture) else (y1, "top")
        text = panel.text(x0, y, name or str(label), va=side, fontsize=8, color="w", clip_on=True)
        text.set_bbox({"facecolor": 0.7 * fill, "edgecolor": "none", "pad": 1})
    panel.set_title(f"{len(found)} detections", fontsize=10)
    panel.set_axis_off()


def _draw_densities(panel: Axes, layers: dict[str, FFNActivity]) -> None:
    place = list(range(len(layers)))
    kept = [float(layer.density) for layer in layers.values()]
    active = [float(layer.firing) for layer in layers.values()]
    panel.barh(place, kept, 0.75, color=_KEPT, label="kept")
    panel.barh(place, active, 0.75, color=_ACTIVE, label="active")
    for y, share in zip(place, kept, strict=True):
        panel.text(share, y, f" {share:.1%}", va="center", fontsize=8, color=_KEPT)
    panel.set_yticks(place, list(layers), fontsize=8)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.35 * max(*kept, *active, 1e-3))
    panel.set_xticks([])
    panel.spines[["top", "right", "bottom"]].set_visible(False)
    panel.set_title("share of all neurons", fontsize=10)
    panel.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=2)
