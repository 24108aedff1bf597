"""The interface between the sparse FFN and the back ends that compute it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from detr_jax.kernels.block_masks import BlockLists, pad_tokens
from detr_jax.kernels.experts import Experts


class FFNWeights(NamedTuple):
    """An FFN as arrays: relu(x W_in^T + b_in) W_out + b_out, neurons on the rows of both matrices."""

    w_in: Float[Array, "F d"]
    b_in: Float[Array, " F"]
    w_out: Float[Array, "F d"]
    b_out: Float[Array, " d"]


@dataclass(frozen=True)
class FFNShape:
    """The static facts about a sparse FFN by which a back end is chosen.

    Attributes:
        dtype: of the inputs and weights.
        tile_size: tokens per tile.
        d_model: `d`.
        hidden: `F`.
        block_size: neurons per block.
        tokens: of all images together; may be a symbol of `jax.export`, and then so may `tile_size`.
    """

    dtype: jnp.dtype
    tile_size: int
    d_model: int
    hidden: int
    block_size: int
    tokens: int


KernelFn = Callable[[jax.Array, FFNWeights, BlockLists, jax.Array | None, int], jax.Array]
"""The FFN of tiles that each compute their own blocks: x (images, tokens, d), weights, lists whose `indices` (images *
tiles, B) have permutations of the blocks as rows, active (images, tokens, G) bool or None, tokens per tile, of which
the last one of an image may have fewer -> like x. `active` are the groups that each token gets of its tile's blocks,
None for all of them."""
TilesFn = Callable[[jax.Array, FFNWeights, BlockLists, jax.Array | None], jax.Array]
"""The same for whole tiles: x (tiles, tile tokens, d), active (tiles, tile tokens, G) or None."""


def in_tiles(run: TilesFn) -> KernelFn:
    """The FFN of images whose tokens are padded to whole tiles."""

    def of_images(x, weights, lists, active, tile_size):
        images, tokens, d = x.shape
        tiles = partial(jax.tree.map, lambda a: pad_tokens(a, tile_size).reshape(-1, tile_size, a.shape[-1]))
        return run(tiles(x), weights, lists, tiles(active)).reshape(images, -1, d)[:, :tokens]

    return of_images


@dataclass(frozen=True)
class ExpertsShape:
    """The static facts about narrow experts by which a back end is chosen.

    Attributes:
        dtype: of the inputs and weights.
        tokens: of all images together; may be a symbol of `jax.export`.
        d_model: `d`.
        widths: neurons of each expert.
    """

    dtype: jnp.dtype
    tokens: int
    d_model: int
    widths: tuple[int, ...]


@dataclass(frozen=True)
class SamplingShape:
    """What a back end has to know of a multi-scale sampling.

    Attributes:
        dtype: of the values.
        queries: of an image.
        levels: rows and columns of each.
        heads: `H`.
        features: D, of a head.
    """

    dtype: jnp.dtype
    queries: int
    levels: tuple[tuple[int, int], ...]
    heads: int
    features: int


RoutedFn = Callable[[jax.Array, Experts, jax.Array], jax.Array]
"""Narrow experts: x (T, d), experts, assignment (T,) int32 -> like x. See `experts.routed_ffn`."""


@dataclass(frozen=True)
class Backend:
    """One way to compute the sparse FFN. Each file of a back end has one, called `BACKEND`.

    Attributes:
        name: of the implementation.
        platforms: kinds of devices on which it is preferred to the back ends that run everywhere.
        run: computes the FFN.
        unsupported_reason: why it cannot compute an FFN on the default device; None if it can.
        break_even: density of tiles and blocks above which the dense FFN is taken on devices that nobody has tuned.
        run_routed: computes narrow experts; None if it cannot.
        routed_rows: rows that it computes for experts with (C,) tokens of T in all, whole tiles of them.
        routed_unsupported_reason: why it cannot compute some experts on the default device; None if it can.
    """

    name: str
    platforms: tuple[str, ...]
    run: KernelFn
    unsupported_reason: Callable[[FFNShape], str | None]
    break_even: float
    run_routed: RoutedFn | None = None
    routed_rows: Callable[[jax.Array, int], jax.Array] = lambda counts, tokens: jnp.full_like(counts, tokens)
    routed_unsupported_reason: Callable[[ExpertsShape], str | None] = lambda shape: None
