"""Image tokens that the layers of an encoder update, and what decides it.

A token that a layer does not update keeps its features, and stays a key and a value of attention for the others: its
query side and its FFN are saved (Roh et al. 2022, Sparse DETR, section 3).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp


class TokenSelector(Protocol):
    """Decides which image tokens each layer of an encoder updates. A pytree, so that it passes through `jax.jit`."""

    def counts(self, tokens: int, layers: int) -> tuple[int, ...]:
        """Numbers of an image's tokens that each layer updates."""

    def __call__(self, x: jax.Array, tokens: jax.Array, levels: Sequence[int]) -> jax.Array:
        """Scores (batch, tokens) float32 of the tokens before the encoder; those that score highest are updated.

        Args:
            x: (batch, tokens, d).
            tokens: (batch, tokens) bool, false for padding.
            levels: numbers of tokens of the levels, one after the other.
        """


class KeptTokens(NamedTuple):
    """The tokens that each layer of an encoder updates."""

    order: jax.Array
    """(batch, k) int32, tokens from the highest score on, as many as any layer updates."""
    counts: tuple[int, ...]
    """First entries of the order that each layer updates."""
    traced: bool
    """Compute all tokens, as FFNs are traced; those that are not kept count as padding in traces."""

    def of_layer(self, layer: int) -> jax.Array:
        """(batch, k) int32, tokens that a layer updates, in the order of the image."""
        return jnp.sort(self.order[:, : self.counts[layer]], axis=1)


def kept_tokens(
    selector: TokenSelector,
    x: jax.Array,
    tokens: jax.Array,
    levels: Sequence[int],
    layers: int,
    *,
    traced: bool = False,
) -> KeptTokens:
    """Tokens that a selector keeps of x (batch, tokens, d) before an encoder; padding comes last."""
    counts = selector.counts(x.shape[1], layers)
    scores = jnp.where(tokens, selector(x, tokens, levels), -jnp.inf)
    return KeptTokens(jax.lax.top_k(scores, max(counts))[1].astype(jnp.int32), counts, traced)


def take_tokens(array: jax.Array, rows: jax.Array) -> jax.Array:
    """(batch, tokens, ...) -> (batch, k, ...), the tokens of `rows` (batch, k)."""
    return jnp.take_along_axis(array, rows.reshape(*rows.shape, *[1] * (array.ndim - 2)), axis=1)


def put_tokens(array: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    """(batch, tokens, ...) with other values (batch, k, ...) at `rows` (batch, k), all different."""
    return jax.vmap(lambda array, rows, values: array.at[rows].set(values, unique_indices=True))(array, rows, values)


def is_kept(rows: jax.Array, tokens: int) -> jax.Array:
    """(batch, tokens) bool, whether a token is one of `rows` (batch, k)."""
    return put_tokens(jnp.zeros((len(rows), tokens), bool), rows, jnp.ones(rows.shape, bool))


UpdateTokens = Callable[[jax.Array | None, jax.Array], jax.Array]
"""New features (batch, k, d) of the tokens of `rows` (batch, k), or of all for None; with whether FFNs count them."""


def update_layer(
    x: jax.Array, tokens: jax.Array, kept: KeptTokens | None, layer: int, update: UpdateTokens
) -> jax.Array:
    """Features (batch, tokens, d) after a layer that updates some tokens, of which only these are computed.

    Args:
        x: features before it.
        tokens: (batch, tokens) bool, false for padding.
        kept: None for all.
        layer: index of the layer.
        update: computes it; takes rows and which of these tokens exist.
    """
    if kept is None:
        return update(None, tokens)
    rows = kept.of_layer(layer)
    if kept.traced:
        among = is_kept(rows, x.shape[1])
        return jnp.where(among[..., None], update(None, tokens & among), x)
    return put_tokens(x, rows, update(rows, take_tokens(tokens, rows)))
