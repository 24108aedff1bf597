"""Hard decisions with the gradient of probabilities, to train gates that are in effect."""

from dataclasses import field

import jax
import jax.numpy as jnp

from detr_jax.kernels import repeat_per_tile
from detr_jax.methods import Thresholded
from detr_jax.methods.tiles import existing_tokens
from detr_jax.models import FFNWeights, Selection
from detr_jax.pytrees import pytree


@pytree
class StraightThrough:
    """A selector whose decisions have the gradient of probabilities (Bengio et al. 2013, arXiv 1308.3432).

    Where decisions are drawn by their probabilities, an open gate feels what closing it would cost; one that is open
    for certain has a gradient as if its neurons were worth nothing by themselves."""

    of: Thresholded
    """Decides; its scores are in log-odds."""
    key: jax.Array | None = None
    """To draw decisions with; None decides as `of` does."""
    tile_size: int = field(default=1, metadata={"static": True})
    """Consecutive tokens that are computed together: each gets what one of them needs, with its own gradient."""

    def logits(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        """(images, tokens, G) by how much the scores exceed the threshold; arguments as of a call."""
        decisions = self.of.score(ffn, x, tokens) - self.of.threshold
        return repeat_per_tile(decisions, tokens.shape[-1], self.of.score.traits.tile_size)

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> Selection:
        logits = self.logits(ffn, x, tokens)
        images, count, groups = logits.shape
        if self.key is not None:
            # Tokens that share a decision share the draw, or one of many would nearly always open the group.
            together = self.of.score.traits.tile_size or count
            draws = jax.random.logistic(self.key, (images, -(-count // together), groups))
            logits += repeat_per_tile(draws, count, together)
        mask = hard_decisions(logits, tokens)
        active = mask > 0
        if self.tile_size > 1:
            union = existing_tokens(active, tokens, self.tile_size, False).any(2)
            active = repeat_per_tile(union, count, self.tile_size)
            mask = active + (mask - jax.lax.stop_gradient(mask))
        return Selection(active=active, mask=mask)


def hard_decisions(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """1 where (images, tokens, G) logits of a token that exists are at least 0, otherwise 0; gradient of a sigmoid."""
    # As 1 - (1 - p), whose logarithm does not lose small probabilities.
    soft = jnp.where(tokens[..., None], -jnp.expm1(jax.nn.log_sigmoid(-logits)), 0)
    kept = (logits >= 0) & tokens[..., None]
    return kept.astype(soft.dtype) + (soft - jax.lax.stop_gradient(soft))


def mean_density(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """The share () of the pairs of token and group that are computed; arguments and gradient as of `hard_decisions`."""
    return hard_decisions(logits, tokens).sum() / jnp.maximum(tokens.sum() * logits.shape[-1], 1)
