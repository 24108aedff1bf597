"""Tiles of tokens: what hardware skips is a group that no token of a tile needs, so the order of the tokens matters."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


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
    if tile_size < 1:
        raise ValueError(f"a tile must have at least 1 token, not {tile_size}")
    images, count, groups = active.shape
    missing = -count % tile_size
    needed = jnp.pad(active & tokens[..., None], ((0, 0), (0, missing), (0, 0)))
    exists = jnp.pad(tokens, ((0, 0), (0, missing)))
    tiles = needed.reshape(images, -1, tile_size, groups).any(2)
    return TileCounts(pairs=exists.reshape(images, -1, tile_size).any(2).sum() * groups, active=tiles.sum())
