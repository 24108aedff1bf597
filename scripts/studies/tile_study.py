"""Where sparsity goes between a token and what hardware skips: tiles of tokens in an order times blocks of neurons."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from top_p import contributions, needed

from detr_jax.kernels import signature_order
from detr_jax.methods.grouping import active_groups, group_count
from detr_jax.methods.tiles import tiles_of
from detr_jax.models import FFNTrace
from detr_jax.models.base import HasFFNs

TokenOrder = Literal["raster", "signature"]
"""Tokens as they come, or sorted by the blocks that are active for them (`kernels.signature_order`)."""


@dataclass(frozen=True)
class Setting:
    """A way to cut an FFN's work into pairs of token tile and neuron block.

    Attributes:
        neurons: name of the order of its neurons.
        block_size: neurons per block.
        tokens: order of its tokens.
        tile_size: tokens per tile; None for all of an image.
    """

    neurons: str
    block_size: int
    tokens: TokenOrder
    tile_size: int | None


@dataclass(frozen=True)
class Measurement:
    """What a setting leaves of an FFN's sparsity.

    Attributes:
        firing: share of the pairs in which a neuron fires for a token.
        holding: share of the pairs in which a neuron is among those that make up nearly all of the tile's contribution.
        making_up: share of the pairs that is enough when blocks themselves are chosen to make up as much of it.
        errors: relative error of the output, ||y_sparse - y|| / ||y|| without b_out, when every tile keeps a share of
            the blocks, those that contribute most to it; by share.
    """

    firing: float
    holding: float
    making_up: float
    errors: dict[float, float]


def settings_of(
    orders: Sequence[TokenOrder], tile_sizes: Sequence[int], neurons: Mapping[int, str], *, tokens: int
) -> list[Setting]:
    """All settings that differ: tiles of one token and whole images know no order.

    Args:
        orders: of the tokens.
        tile_sizes: tokens per tile; those that are no smaller than an image are left out.
        neurons: block sizes with the name of the order of the neurons.
        tokens: of the smallest image.
    """
    sizes = [*(size for size in tile_sizes if size < tokens), None]
    return [
        Setting(order_of_neurons, block_size, order, size)
        for block_size, order_of_neurons in neurons.items()
        for size in sizes
        for order in (orders if size not in (1, None) else ("raster",))
    ]


def token_counts(model: HasFFNs, batches: Iterable[Any]) -> dict[str, int]:
    """Tokens of the smallest image of every FFN, padding included."""
    shapes = [jax.eval_shape(_dense_traces, model, batch) for batch in batches]
    return {name: min(traces[name].tokens.shape[1] for traces in shapes) for name in model.ffn_weights()}


@jax.jit
def _dense_traces(model, inputs):
    return model.traces(inputs, {})


def measure_settings(
    model: HasFFNs,
    batches: Iterable[Any],
    settings: Mapping[str, Sequence[Setting]],
    neuron_orders: Mapping[tuple[str, int], Mapping[str, np.ndarray]],
    shares: Sequence[float],
    need_share: float,
    report: Callable[[], None],
) -> dict[str, dict[Setting, Measurement]]:
    """Measures FFNs, each for itself on the inputs that it has in the dense model.

    Args:
        model: the FFNs.
        batches: its inputs.
        settings: of each FFN by name.
        neuron_orders: (F,) by name of the order and block size, then by name of the FFN.
        shares: of the blocks, that tiles keep; the nearest number of blocks is kept, but at least one.
        need_share: of a tile's contribution, what "nearly all" of it is.
        report: called after every FFN in every batch.

    Returns:
        by FFN and setting.

    Raises:
        ValueError: if a block size does not divide the hidden neurons, or a tile would have no token.
    """
    weights = model.ffn_weights()
    count = partial(_count, shares=tuple(shares), need_share=need_share)
    totals: dict[str, dict[Setting, Sums]] = {name: {} for name in settings}
    for batch in batches:
        traces = _dense_traces(model, batch)
        for name, of_ffn in totals.items():
            trace = traces[name]
            for setting in settings[name]:
                neurons = neuron_orders[setting.neurons, setting.block_size][name]
                tokens = _token_order(setting, trace, neurons)
                tile_size = setting.tile_size or trace.tokens.shape[1]
                sums = count(weights[name], trace, neurons, tokens, tile_size=tile_size, block_size=setting.block_size)
                sums = jax.tree.map(lambda total: np.asarray(total, np.float64), jax.device_get(sums))
                of_ffn[setting] = jax.tree.map(np.add, of_ffn[setting], sums) if setting in of_ffn else sums
            report()
    return {
        name: {setting: _measurement(sums, shares) for setting, sums in of_ffn.items()}
        for name, of_ffn in totals.items()
    }


class Sums(NamedTuple):
    """Of one setting: numbers of pairs, and squares of the output.

    Attributes:
        pairs, firing, holding, making_up: () as in `Measurement`.
        output: () sum of squares.
        lost: (shares,) sum of squares of what is left out.
    """

    pairs: jax.Array
    firing: jax.Array
    holding: jax.Array
    making_up: jax.Array
    output: jax.Array
    lost: jax.Array


def _token_order(setting: Setting, trace: FFNTrace, neurons: np.ndarray) -> jax.Array:
    """(images, tokens) order of the tokens, padding last."""
    if setting.tokens == "signature":
        return _signatures(trace, neurons, block_size=setting.block_size)
    return jnp.argsort(~trace.tokens, axis=1, stable=True)


@partial(jax.jit, static_argnames="block_size")
def _signatures(trace, neurons, *, block_size):
    hidden = trace.hidden[..., neurons]
    return signature_order(active_groups(hidden, group_count(len(neurons), block_size)), trace.tokens)


@partial(jax.jit, static_argnames=("tile_size", "block_size", "shares", "need_share"))
def _count(weights, trace, neurons, order, *, tile_size, block_size, shares, need_share):
    blocks = group_count(len(neurons), block_size)

    def placed(values: jax.Array) -> jax.Array:
        return tiles_of(jnp.take_along_axis(values, order[..., None], 1), tile_size)

    def of_blocks(values: jax.Array) -> jax.Array:
        return values.reshape(*values.shape[:-1], blocks, block_size)

    hidden = placed(jnp.where(trace.tokens[..., None], trace.hidden.astype(jnp.float32), 0)[..., neurons])
    contributed = placed(contributions(weights, trace)[..., neurons]).sum(2)
    by_block = of_blocks(contributed).sum(-1)
    exists = placed(trace.tokens[..., None]).any((2, 3))
    ranked = -jnp.sort(-by_block, axis=-1)
    w_out = weights.w_out.astype(jnp.float32)[neurons]

    def lost(share: float) -> jax.Array:
        least = ranked[..., max(1, round(share * blocks)) - 1, None]
        skipped = jnp.repeat(by_block < least, block_size, axis=-1)
        return jnp.square(jnp.where(skipped[:, :, None], hidden, 0) @ w_out).sum()

    return Sums(
        pairs=exists.sum() * blocks,
        firing=of_blocks(hidden > 0).any((2, -1)).sum(),
        holding=of_blocks(needed(contributed, need_share)).any(-1).sum(),
        making_up=needed(by_block, need_share).sum(),
        output=jnp.square(hidden @ w_out).sum(),
        lost=jnp.stack([lost(share) for share in shares]),
    )


def _measurement(sums: Sums, shares: Sequence[float]) -> Measurement:
    output = max(sums.output, np.finfo(np.float64).tiny)  # a silent FFN has no error
    return Measurement(
        firing=float(sums.firing / sums.pairs),
        holding=float(sums.holding / sums.pairs),
        making_up=float(sums.making_up / sums.pairs),
        errors={share: float(np.sqrt(lost / output)) for share, lost in zip(shares, sums.lost, strict=True)},
    )
