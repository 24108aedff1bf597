"""Tiles of tokens: what hardware skips is a group that no token of a tile needs, so the order of the tokens matters."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.errors import InputError
from detr_jax.kernels import pad_tokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TileCounts:
    """Counts of one FFN.

    Attributes:
        pairs: () pairs of token tile and group.
        active: () of them, those that are computed.
    """

    pairs: jax.Array
    active: jax.Array

    def __add__(self, other: "TileCounts") -> "TileCounts":
        """The sum of two, in 64 bits."""
        return jax.tree.map(lambda a, b: np.asarray(a, np.int64) + np.asarray(b), self, other)

    @property
    def density(self) -> float:
        """Share of the pairs that is computed."""
        return float(self.active / self.pairs)


def count_tiles(active: jax.Array, tokens: jax.Array, tile_size: int) -> TileCounts:
    """Counts the tiles of consecutive tokens of an image that need a group; jittable.

    A tile needs a group when one of its tokens does. The last tile of an image may be shorter; padding belongs to no
    tile, and a tile of padding alone does not count.

    Args:
        active: (images, tokens, G) bool, the groups that each token needs.
        tokens: (images, tokens) bool, false for padding.
        tile_size: tokens per tile.

    Raises:
        ValueError: if a tile would have no token.
    """
    needed = existing_tokens(active, tokens, tile_size, False).any(2)
    return TileCounts(pairs=existing_tiles(tokens, tile_size).sum() * active.shape[-1], active=needed.sum())


def existing_tiles(tokens: jax.Array, tile_size: int) -> jax.Array:
    """(images, tokens) bool, false for padding -> (images, tiles) bool, false for tiles of padding alone."""
    return tiles_of(tokens[..., None], tile_size).any((2, 3))


def existing_tokens(values: jax.Array, tokens: jax.Array, tile_size: int, padding: float | bool) -> jax.Array:
    """(images, tokens, n) -> (images, tiles, tile_size, n), with a value for tokens that do not exist.

    Args:
        values: of consecutive tokens.
        tokens: (images, tokens) bool, false for padding.
        tile_size: tokens per tile, the last of which may be shorter.
        padding: the value of padding and of what the last tile lacks.
    """
    return jnp.where(tiles_of(tokens[..., None], tile_size), tiles_of(values, tile_size), padding)


def mean_of_tokens(values: jax.Array, tokens: jax.Array, tile_size: int | None) -> jax.Array:
    """The mean over the tokens of each tile; 0 for a tile of padding alone.

    Args:
        values: (..., tokens, n).
        tokens: (..., tokens) bool, false for padding.
        tile_size: consecutive tokens per tile, the last of which may be shorter; None for all tokens in one.

    Returns:
        (..., tiles, n).
    """
    weights = tokens[..., None].astype(values.dtype)
    size = tile_size or tokens.shape[-1]
    total, members = (tiles_of(array, size).sum(-2) for array in (values * weights, weights))
    return total / jnp.maximum(members, 1)


def tiles_of(values: jax.Array, tile_size: int) -> jax.Array:
    """(..., tokens, n) -> (..., tiles, tile_size, n) of consecutive tokens, zeros where the last tile is shorter.

    Raises:
        ValueError: if a tile would have no token.
    """
    if tile_size < 1:
        raise InputError(f"a tile must have at least 1 token, not {tile_size}")
    padded = pad_tokens(values, tile_size)
    return padded.reshape(*values.shape[:-2], padded.shape[-2] // tile_size, tile_size, values.shape[-1])
