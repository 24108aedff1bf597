"""Floating-point operations of a dense and of a sparse detector."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.data.loading import layout_batches
from detr_jax.evaluation.counts import ActivityCounts
from detr_jax.methods import Traits
from detr_jax.models import Detector


@dataclass(frozen=True)
class DenseFlops:
    """Floating-point operations for one image, two for a multiply-add.

    Attributes:
        ffns: of each FFN's two matrix products by name.
        transformer: encoder, decoder and heads, as XLA counts them.
        detector: everything, as XLA counts them.
    """

    ffns: dict[str, float]
    transformer: float
    detector: float


def dense_flops(model: Detector, height: int, width: int) -> DenseFlops:
    """Counts the dense forward pass of one image of (height, width) pixels."""
    pixels = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    mask, valid = jax.ShapeDtypeStruct((1, height, width), bool), jax.ShapeDtypeStruct((1,), bool)
    features = jax.eval_shape(lambda model, *images: model.embed(*images), model, pixels, mask, valid)
    grids = [math.prod(grid) for grid in model.token_grids((height, width))]
    tokens = {
        name: sum(grids[i] for i in spec.grids) if spec.tokens == "image" else model.queries
        for name, spec in model.ffn_specs().items()
    }
    return DenseFlops(
        ffns={name: 4.0 * spec.d_model * spec.hidden * tokens[name] for name, spec in model.ffn_specs().items()},
        transformer=_count(lambda model, features: model.transform(features), model, features),
        detector=_count(lambda model, pixels: model(pixels), model, pixels),
    )


def mean_dense_flops(model: Detector, sizes: np.ndarray) -> DenseFlops:
    """Mean over images of the dense forward pass, each in the padded shape that it is computed in.

    `sizes` (images, 2) are height and width of the original images.
    """
    shapes = Counter(layout.shape[1:] for layout in layout_batches(sizes, model.preprocessing, 1))
    counted = [dense_flops(model, *shape) for shape in shapes]
    mean = partial(np.average, weights=list(shapes.values()))
    return DenseFlops(
        ffns={name: float(mean([flops.ffns[name] for flops in counted])) for name in model.ffn_specs()},
        transformer=float(mean([flops.transformer for flops in counted])),
        detector=float(mean([flops.detector for flops in counted])),
    )


def _count(function: Callable[..., Any], *arguments: Any) -> float:
    costs: Any = jax.jit(function).lower(*arguments).cost_analysis()
    return float(costs["flops"])


def remaining_share(traits: Traits, cost: float, counts: ActivityCounts, d_model: int, features: int) -> float:
    """Share of an FFN's multiply-adds that is left, with the selector's own; above 1 where it costs more than it saves.

    `cost` is the selector's multiply-adds per token, `counts` are of the FFN while the selector was in effect.
    """
    kept = counts.density * counts.channel_density
    first = kept if traits.saves in ("both", "first") else 1.0
    second = counts.density if traits.saves in ("both", "second") else 1.0
    return (first + second) / 2 + cost / (2 * d_model * features)


def sparse_flops(dense: DenseFlops, shares: Mapping[str, float]) -> dict[str, float]:
    """Operations for one image with only a share of each FFN left: of all FFNs, the transformer and the detector."""
    whole = sum(dense.ffns.values())
    left = sum(flops * shares.get(name, 1.0) for name, flops in dense.ffns.items())
    return {"ffns": left, "transformer": dense.transformer - whole + left, "detector": dense.detector - whole + left}
