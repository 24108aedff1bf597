"""Tiles of tokens: what hardware skips is a group that no token of a tile needs, so the order of the tokens matters."""

import jax
import jax.numpy as jnp

from detr_jax.errors import InputError
from detr_jax.kernels import pad_tokens
from detr_jax.models import FFNTrace
from detr_jax.pytrees import Sums, pytree


@pytree
class TileCounts(Sums):
    """Pairs of token tile and group of one FFN, and how many of them are computed, both ()."""

    pairs: jax.Array
    active: jax.Array

    @property
    def density(self) -> float:
        """Share of the pairs that is computed."""
        return float(self.active / self.pairs)


def count_tiles(active: jax.Array, tokens: jax.Array, tile_size: int) -> TileCounts:
    """Counts of tiles of consecutive tokens; jittable.

    A tile needs a group when one of its tokens does, by `active` (images, tokens, G) bool. The last tile of an image
    may be shorter. Tiles of padding alone, where `tokens` (images, tokens) is false, do not count.
    """
    needed = existing_tokens(active, tokens, tile_size, False).any(2)
    return TileCounts(pairs=existing_tiles(tokens, tile_size).sum() * active.shape[-1], active=needed.sum())


def count_kept(trace: FFNTrace, tile_size: int = 1) -> TileCounts:
    """Counts of the groups, or neurons, that the selection of a trace keeps; jittable."""
    active = trace.selection.per_token(trace.tokens.shape, trace.hidden.shape[-1])
    if active is None:
        active = jnp.ones((*trace.tokens.shape, 1), bool)
    return count_tiles(active, trace.tokens, tile_size)


def existing_tiles(tokens: jax.Array, tile_size: int) -> jax.Array:
    """(images, tokens) bool, false for padding -> (images, tiles) bool, false for tiles of padding alone."""
    return tiles_of(tokens[..., None], tile_size).any((2, 3))


def existing_tokens(values: jax.Array, tokens: jax.Array, tile_size: int, padding: float | bool) -> jax.Array:
    """(images, tokens, n) -> (images, tiles, tile_size, n), with the value `padding` for tokens that do not exist."""
    return jnp.where(tiles_of(tokens[..., None], tile_size), tiles_of(values, tile_size), padding)


def mean_of_tokens(values: jax.Array, tokens: jax.Array, tile_size: int | None) -> jax.Array:
    """(..., tokens, n) -> (..., tiles, n), the mean over the tokens of each tile; 0 for a tile of padding alone.

    `tokens` (..., tokens) bool is false for padding; a `tile_size` of None makes all tokens one tile.
    """
    weights = tokens[..., None].astype(values.dtype)
    size = tile_size or tokens.shape[-1]
    total, members = (tiles_of(array, size).sum(-2) for array in (values * weights, weights))
    return total / jnp.maximum(members, 1)


def tiles_of(values: jax.Array, tile_size: int) -> jax.Array:
    """(..., tokens, n) -> (..., tiles, tile_size, n) of consecutive tokens, zeros where the last tile is shorter.

    Raises an InputError if a tile would have no token.
    """
    if tile_size < 1:
        raise InputError(f"a tile must have at least 1 token, not {tile_size}")
    padded = pad_tokens(values, tile_size)
    return padded.reshape(*values.shape[:-2], padded.shape[-2] // tile_size, tile_size, values.shape[-1])
