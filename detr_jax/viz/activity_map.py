"""Heat maps of where on an image hidden units are active, and where a plan computes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import colormaps
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
HEAT = colormaps["inferno"]
HEAT_OPACITY = 0.6
_ACTIVE, _KEPT = "#d1495b", "#30638e"


@dataclass(frozen=True)
class ActivityMap:
    """Shares of an FFN over an image, for the tokens of one grid.

    Attributes:
        title: name of the FFN, with the grid's stride if it has several.
        active: (rows, columns) share of each token's hidden neurons that is active.
        kept: (rows, columns) share of them that the plan keeps, or of its input channels where the plan drops those.
        covered: rows and columns of the grid that the image covers, in fractions of tokens; the last ones may reach
            beyond it.
    """

    title: str
    active: np.ndarray
    kept: np.ndarray
    covered: tuple[float, float]

    def over(self, picture: np.ndarray, kind: str, most: float) -> Image.Image:
        """A heat map of what is "active" or "kept" over a grey image; `most` has the brightest colour.

        `picture` is (height, width, 3) uint8.
        """
        heat = Image.fromarray(HEAT(getattr(self, kind) / most, bytes=True)).convert("RGB")
        grey = Image.fromarray(np.uint8(255 * _grey(picture))).convert("RGB")
        rows, columns = self.covered
        heat = heat.resize(grey.size, Image.Resampling.NEAREST, box=(0, 0, columns, rows))
        return Image.blend(grey, heat, HEAT_OPACITY)


@dataclass(frozen=True)
class ImageActivity:
    """Activity of a sparse detector's FFNs in one image.

    Attributes:
        layers: (1, tokens, ...) of each FFN by name, on the host.
        maps: of the FFNs whose tokens lie on a grid.
    """

    layers: dict[str, FFNActivity]
    maps: list[ActivityMap]

    @classmethod
    def of(cls, model: SparseDETR, image: ImageLike) -> ImageActivity:
        """Runs the detector on a file, a PIL image or an array; raises as `preprocess_images`."""
        pixel_values, pixel_mask = map(jnp.asarray, preprocess_images(image, model.preprocessing))
        layers = {name: jax.device_get(layer) for name, layer in model.inspect(pixel_values, pixel_mask).items()}
        size = pixel_values.shape[1:3]
        return cls(layers, [found for name, layer in layers.items() for found in _maps(model, name, layer, size)])

    def shares(self, name: str) -> tuple[float, float]:
        """The shares of an FFN that are active and kept, see `ActivityMap`; means over its tokens."""
        layer = self.layers[name]
        active, kept = (share[layer.tokens[0]].mean() for share in _shares(layer))
        return float(active), float(kept)


def plot_activity(model: SparseDETR, image: ImageLike, threshold: float) -> Figure:
    """The detections in an image, heat maps of the FFNs whose tokens lie on a grid, and bars for all FFNs.

    The upper row shows the share of each token's hidden neurons that are active, the lower one the share that the plan
    keeps. Each row has one scale. Detections are drawn from a score of `threshold` on.
    """
    picture = pixels(image)
    activity = ImageActivity.of(model, picture)
    height, width = picture.shape[:2]

    tall = min(max(height / width, 0.6), 1.6) * _PANEL
    columns = 1 + len(activity.maps)
    figure = Figure(figsize=(columns * _PANEL + 0.9, 2 * tall + 1.0), layout="constrained")
    axes = figure.subplots(2, columns)
    _draw_detections(axes[0, 0], picture, cast(ImageDetections, model.detect(picture, threshold)))
    _draw_densities(axes[1, 0], activity)

    for row, kind in zip(axes, ("active", "kept"), strict=True):
        most = brightest(activity.maps, kind)
        for panel, found in zip(row[1:], activity.maps, strict=True):
            share = getattr(found, kind)
            (rows, columns), (rows_covered, columns_covered) = share.shape, found.covered
            extent = (0, width * columns / columns_covered, height * rows / rows_covered, 0)
            panel.imshow(_grey(picture), extent=(0, width, height, 0), cmap="gray", vmin=0, vmax=1)
            heat = {"cmap": HEAT, "vmin": 0, "vmax": most, "alpha": HEAT_OPACITY, "interpolation": "nearest"}
            shown = panel.imshow(share, extent=extent, **heat)
            panel.set(xlim=(0, width), ylim=(height, 0))
            panel.set_title(f"{found.title}   {share.mean():.1%}", fontsize=10)
            panel.set_axis_off()
        bar = figure.colorbar(shown, ax=row[-1], format=lambda share, _: f"{share:.0%}", fraction=0.06)
        bar.set_label(f"{kind} neurons, per token", fontsize=9)
        if bar.solids is not None:
            bar.solids.set_alpha(1)
        bar.ax.tick_params(labelsize=8)
    return figure


def brightest(maps: Iterable[ActivityMap], kind: str) -> float:
    """The largest share that is "active" or "kept" in some maps, for their common scale; 1 where all are 0."""
    return max(float(getattr(found, kind).max()) for found in maps) or 1.0


def _grey(picture: np.ndarray) -> np.ndarray:
    """(height, width) from 0.2 to 1: without colours and the darkest tones, which are the heat's."""
    return 0.2 + 0.8 * np.asarray(Image.fromarray(picture).convert("L"), np.float32) / 255


def _shares(layer: FFNActivity) -> tuple[np.ndarray, np.ndarray]:
    """(tokens,) of an FFN that are active and kept, 0 for padding; a selector drops neurons or channels, not both."""
    kept = layer.kept[0].mean(-1) * layer.channels[0].mean(-1)
    return np.asarray(layer.fires[0]).mean(-1), np.asarray(kept * layer.tokens[0])


def _maps(model: SparseDETR, name: str, layer: FFNActivity, resized: tuple[int, ...]) -> Iterator[ActivityMap]:
    """A map for each token grid of an FFN; `resized` is the height and width of the detector's input."""
    indices = model.detector.ffn_specs()[name].grids
    ends = np.cumsum([rows * columns for rows, columns in layer.grids])
    for index, grid, end in zip(indices, layer.grids, ends, strict=True):
        stride = model.detector.strides[index]
        tokens = slice(end - grid[0] * grid[1], end)
        title = name if len(indices) == 1 else f"{name}, stride {stride}"
        active, kept = (share[tokens].reshape(grid) for share in _shares(layer))
        yield ActivityMap(title, active, kept, (resized[0] / stride, resized[1] / stride))


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


def _draw_densities(panel: Axes, activity: ImageActivity) -> None:
    layers = list(activity.layers)
    place = list(range(len(layers)))
    active, kept = zip(*map(activity.shares, layers), strict=True)
    panel.barh(place, kept, 0.75, color=_KEPT, label="kept")
    panel.barh(place, active, 0.75, color=_ACTIVE, label="active")
    for y, share in zip(place, kept, strict=True):
        panel.text(share, y, f" {share:.1%}", va="center", fontsize=8, color=_KEPT)
    panel.set_yticks(place, layers, fontsize=8)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.35 * max(*kept, *active, 1e-3))
    panel.set_xticks([])
    panel.spines[["top", "right", "bottom"]].set_visible(False)
    panel.set_title("share of all neurons", fontsize=10)
    panel.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=2)
