"""A figure of where on an image neurons fire, and where a plan computes them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from detr_jax.data.image_list import ImageLike, preprocess_images
from detr_jax.data.images import pixels
from detr_jax.evaluation.inspection import FFNActivity
from detr_jax.files import replacing
from detr_jax.models.detr.postprocess import ImageDetections
from detr_jax.viz.boxes import colour

if TYPE_CHECKING:
    from detr_jax.sparse import SparseDETR

_PANEL = 2.3
"""Width of one picture, in inches."""
_OPACITY = 0.6
"""Of the heat map over the image."""
_FIRES, _KEPT = "#d1495b", "#30638e"


def draw_activity(model: SparseDETR, image: ImageLike, path: Path, threshold: float) -> None:
    """Writes the figure: the detections, heat maps of every encoder FFN over the image, and bars for all FFNs.

    The upper row shows the share of each token's hidden neurons that fire, the lower one the share that the plan keeps.
    Each row has one scale.

    Args:
        model: a sparse detector.
        image: a file, a PIL image or an array.
        path: of the figure, a PNG.
        threshold: least score of the detections that are drawn.
    """
    picture = pixels(image)
    pixel_values, pixel_mask = preprocess_images(picture, model.config)
    layers = {name: jax.device_get(layer) for name, layer in model.inspect(pixel_values, pixel_mask).items()}
    encoder = {name: layer for name, layer in layers.items() if layer.grid is not None}
    stride, (resized_height, resized_width) = model.config.backbone.stride, pixel_values.shape[1:3]
    height, width = picture.shape[:2]

    columns = 1 + len(encoder)
    tall = min(max(height / width, 0.6), 1.6) * _PANEL
    figure = Figure(figsize=(columns * _PANEL + 0.9, 2 * tall + 1.0), layout="constrained")
    axes = figure.subplots(2, columns)
    found = model.detect(picture, threshold)
    _draw_detections(axes[0, 0], picture, found)
    _draw_densities(axes[1, 0], layers)

    rows = {"neurons that fire": _shares_firing, "neurons that are kept": _shares_kept}
    for row, (what, shares) in zip(axes, rows.items(), strict=True):
        maps = {name: shares(layer).reshape(layer.grid) for name, layer in encoder.items()}
        most = max(float(heat.max()) for heat in maps.values()) or 1.0
        for panel, (name, heat) in zip(row[1:], maps.items(), strict=True):
            token_rows, token_columns = heat.shape
            # A token stands for `stride` pixels of the resized image; the last ones may reach beyond it.
            right, bottom = token_columns * stride / resized_width, token_rows * stride / resized_height
            panel.imshow(_grey(picture), extent=(0, width, height, 0))
            shown = panel.imshow(
                heat,
                cmap="inferno",
                vmin=0,
                vmax=most,
                alpha=_OPACITY,
                extent=(0, width * right, height * bottom, 0),
                interpolation="nearest",
            )
            panel.set(xlim=(0, width), ylim=(height, 0))
            panel.set_title(f"{name}   {heat.mean():.1%}", fontsize=10)
            panel.set_axis_off()
        bar = figure.colorbar(shown, ax=row[-1], format=lambda share, _: f"{share:.0%}", fraction=0.06)
        bar.set_label(f"{what}, per token", fontsize=9)
        bar.solids.set_alpha(1)
        bar.ax.tick_params(labelsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def _draw_detections(panel: Axes, picture: np.ndarray, found: ImageDetections) -> None:
    panel.imshow(picture)
    for (x0, y0, x1, y1), label, name in zip(found.boxes, found.labels.tolist(), found.names, strict=True):
        fill = np.array(colour(label)) / 255
        panel.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=fill, linewidth=1.5))
        place = {"y": y0, "va": "bottom"} if y0 > 0.08 * len(picture) else {"y": y1, "va": "top"}
        text = panel.text(x0, s=name or str(label), fontsize=8, color="w", clip_on=True, **place)
        text.set_bbox({"facecolor": 0.7 * fill, "edgecolor": "none", "pad": 1})
    panel.set_title(f"{len(found)} detections", fontsize=10)
    panel.set_axis_off()


def _draw_densities(panel: Axes, layers: dict[str, FFNActivity]) -> None:
    """Bars of what fires and what is kept in every FFN."""
    place = np.arange(len(layers))
    kept = [float(layer.density) for layer in layers.values()]
    fires = [float(layer.firing) for layer in layers.values()]
    panel.barh(place, kept, 0.75, color=_KEPT, label="kept")
    panel.barh(place, fires, 0.75, color=_FIRES, label="fire")
    for y, share in zip(place, kept, strict=True):
        panel.text(share, y, f" {share:.1%}", va="center", fontsize=8, color=_KEPT)
    panel.set_yticks(place, list(layers), fontsize=8)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.35 * max(*kept, *fires, 1e-3))
    panel.set_xticks([])
    for side in ("top", "right", "bottom"):
        panel.spines[side].set_visible(False)
    panel.set_title("of all neurons", fontsize=10)
    panel.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=2)


def _shares_firing(layer: FFNActivity) -> np.ndarray:
    return np.asarray(layer.fires[0]).mean(-1)


def _shares_kept(layer: FFNActivity) -> np.ndarray:
    return (layer.kept[0] & layer.tokens[0, :, None]).mean(-1)


def _grey(image: np.ndarray) -> np.ndarray:
    """The image without its colours and its darkest tones, which are the heat's."""
    grey = np.asarray(Image.fromarray(image).convert("L"), np.float32) / 255
    return np.repeat((0.2 + 0.8 * grey)[..., None], 3, axis=-1)
