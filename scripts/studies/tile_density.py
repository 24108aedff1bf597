"""From the neurons that fire to the tiles that hardware computes: what each step costs in density."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from detr_jax.calibration.activations import ActivationProfile
from detr_jax.data.features import BackboneFeatures
from detr_jax.evaluation.counts import neurons_computed
from detr_jax.kernels import signature_order
from detr_jax.methods import Oracle
from detr_jax.methods.grouping import group_count
from detr_jax.methods.tiles import TileCounts, count_tiles
from detr_jax.models import DETR, Selectors
from detr_jax.models.base import HasFFNs

TILE_SIZES = (1, 8, 16, 64, 128)
"""Tokens per tile; a tile of one token is the group itself."""


def measure_tiles(
    model: HasFFNs, batches: Iterable[Any], selectors: Selectors, group_size: int, tile_sizes: Sequence[int]
) -> dict[str, dict[str, dict[int, float]]]:
    """Shares of the (token tile, group) pairs that have to be computed.

    Args:
        model: the FFNs.
        batches: its inputs.
        selectors: of all FFNs, in effect.
        group_size: neurons per group.
        tile_sizes: tokens per tile.

    Returns:
        by FFN: `raster`, with the tokens in the order in which they come, and `signature`, in the order of
        `kernels.signature_order`, the share for each tile size.

    Raises:
        ValueError: if the group size does not divide the hidden neurons, or a tile would have no token.
    """
    sizes = tuple(tile_sizes)
    count = partial(_tiles, group_size=group_size, tile_sizes=sizes)
    measured = [jax.device_get(count(model, batch, dict(selectors))) for batch in batches]

    def is_counts(node: Any) -> bool:
        return isinstance(node, TileCounts)

    whole = jax.tree.map(lambda *counts: sum(counts[1:], counts[0]), *measured, is_leaf=is_counts)
    return jax.tree.map(lambda counts: counts.density, whole, is_leaf=is_counts)


@partial(jax.jit, static_argnames=("group_size", "tile_sizes"))
def _tiles(model, batch, selectors, *, group_size, tile_sizes):
    def counts(trace):
        groups = group_count(trace.hidden.shape[-1], group_size)
        active = neurons_computed(trace).reshape(*trace.tokens.shape, groups, -1).any(-1)
        order = signature_order(active, trace.tokens)
        orders = {
            "raster": (active, trace.tokens),
            "signature": (
                jnp.take_along_axis(active, order[..., None], 1),
                jnp.take_along_axis(trace.tokens, order, 1),
            ),
        }
        return {name: {size: count_tiles(*of, size) for size in tile_sizes} for name, of in orders.items()}

    return {name: counts(trace) for name, trace in model.traces(batch, selectors).items()}


def measure_tile_density(
    model: DETR, embedded: Iterable[BackboneFeatures], predicted: Selectors, group_size: int
) -> dict:
    """The densities of each FFN: of the neurons that fire, of exact groups and tiles, of predicted groups and tiles.

    Args:
        model: the detector.
        embedded: images behind the backbone.
        predicted: selectors of all FFNs.
        group_size: neurons per group.

    Returns:
        JSON by FFN: `neurons`, a share; `exact` and `predicted`, as of `measure_tiles`.
    """
    batches = [batch.tokens for batch in embedded]
    names = tuple(model.ffn_specs())
    neurons = measure_tiles(model, batches, dict.fromkeys(names, Oracle(1)), 1, (1,))
    exact = measure_tiles(model, batches, dict.fromkeys(names, Oracle(group_size)), group_size, TILE_SIZES)
    guessed = measure_tiles(model, batches, predicted, group_size, TILE_SIZES)
    return {
        name: {"neurons": neurons[name]["raster"][1], "exact": exact[name], "predicted": guessed[name]}
        for name in names
    }


def describe_statistics(profile: ActivationProfile) -> dict:
    """What figures and readers want to know of activation statistics, as JSON by FFN.

    `kinds` of tokens, and of each kind `tokens`, their number, and `firing`, the share of their activations that is not
    zero; `firing_in_an_image`, the mean share of neurons that fire anywhere in an image; `never`, the share of neurons
    that never fire; `deciles`, of the neurons' firing rates.
    """
    described = {}
    for name in profile.kinds:
        statistics = profile.statistics[name]
        neurons = statistics.fired.shape[1]
        tokens = statistics.tokens
        rates = statistics.fired.sum(0) / max(int(tokens.sum()), 1)
        described[name] = {
            "kinds": list(profile.kinds[name]),
            "tokens": [int(count) for count in tokens],
            "firing": [
                float(f.sum() / max(int(t) * neurons, 1)) for f, t in zip(statistics.fired, tokens, strict=True)
            ],
            "firing_in_an_image": float(statistics.images_fired.sum() / (int(statistics.images) * neurons)),
            "never": float((rates == 0).mean()),
            "deciles": [float(rate) for rate in jnp.quantile(jnp.asarray(rates), jnp.linspace(0, 1, 11))],
        }
    return described
