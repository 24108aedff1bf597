"""Figure of narrow experts: how wide they are, how many tokens they get, and where on an image they work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from detr_jax.data.image_list import ImageLike, preprocess_images
from detr_jax.data.images import pixels
from detr_jax.methods import Executed, RoutedExperts

if TYPE_CHECKING:
    from detr_jax.sparse import SparseDETR

_COLOURS = colormaps["viridis"]


def expert_selectors(model: SparseDETR) -> dict[str, RoutedExperts]:
    """The selectors with experts of a sparse detector by name of the FFN."""
    bare = {n: s.selector if isinstance(s, Executed) else s for n, s in model.plan.selectors.items()}
    return {name: selector for name, selector in bare.items() if isinstance(selector, RoutedExperts)}


def plot_experts(model: SparseDETR, image: ImageLike) -> Figure:
    """Each FFN's experts by width, and for those whose tokens lie on a grid the width of every token's expert.

    In the upper row a step is an expert: its height is the width, its length the share of the image's tokens, and so
    the area under the steps is the density.

    Args:
        model: a sparse detector whose plan has experts.
        image: a file, a PIL image or an array.
    """
    picture = pixels(image)
    pixel_values, pixel_mask = map(jnp.asarray, preprocess_images(picture, model.preprocessing))
    layers = {name: jax.device_get(layer) for name, layer in model.inspect(pixel_values, pixel_mask).items()}
    selectors, specs = expert_selectors(model), model.detector.ffn_specs()
    widest = max(max(selector.widths) for selector in selectors.values())
    norm = Normalize(0, max(widest, 1))
    figure = Figure(figsize=(2.3 * len(selectors) + 0.9, 5.2), layout="constrained")
    axes = figure.subplots(2, len(selectors), squeeze=False)
    for (upper, lower), (name, selector) in zip(axes.T, selectors.items(), strict=True):
        layer = layers[name]
        widths = layer.kept[0].sum(-1)
        of_tokens = np.sort(widths[layer.tokens[0]])[::-1]
        places = np.linspace(0, 1, len(of_tokens) + 1)
        upper.stairs(of_tokens, places, fill=True, color=_COLOURS(0.4))
        upper.set(xlim=(0, 1), ylim=(0, 1.05 * max(widest, 1)))
        upper.set_title(
            f"{name}\n{len(selector.widths)} experts, {of_tokens.mean() / specs[name].hidden:.1%}", fontsize=9
        )
        upper.set_xlabel("share of the tokens", fontsize=8)
        upper.tick_params(labelsize=7)
        lower.set_axis_off()
        if layer.grids:
            rows, columns = layer.grids[-1]
            shown = lower.imshow(widths[-rows * columns :].reshape(rows, columns), cmap=_COLOURS, norm=norm)
    axes[0, 0].set_ylabel("neurons of the expert", fontsize=8)
    axes[1, -1].imshow(picture)
    axes[1, -1].set_title("image", fontsize=9)
    figure.colorbar(shown, ax=axes[1, -1], label="neurons of the token's expert", fraction=0.06)
    return figure
