"""Scores made from other scores: statistical top-k, shares of the largest, one decision for many tokens."""

import dataclasses
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.methods.base import Score, Traits
from detr_jax.methods.tiles import mean_of_tokens
from detr_jax.models import FFNWeights
from detr_jax.pytrees import pytree


class _Derived:
    """Takes over what is not changed."""

    of: Score

    @property
    def traits(self) -> Traits:
        return self.of.traits

    def cost(self, d_model: int, features: int) -> float:
        return self.of.cost(d_model, features)


@pytree
@dataclass(frozen=True)
class Standardised(_Derived):
    """In standard deviations from the mean of the token's scores: about equally many for every token, without a sort.

    You et al. 2025, "Spark Transformer", statistical top-k: for normal scores the threshold is the normal quantile of
    the density; here it is calibrated.

    Attributes:
        of: the score that is standardised, a gate's.
    """

    of: Score

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        return jax.nn.standardize(self.of(ffn, x, tokens), axis=-1)


@pytree
@dataclass(frozen=True)
class ShareOfLargest(_Derived):
    """The predicted output norm of a group as a share of the token's largest: from (1 - tau) on it is kept.

    Szatkowski et al. 2024, "D2DMoE": the gate regresses ||h_g W_out,g||.

    Attributes:
        of: a gate whose softplus is the predicted norm.
    """

    of: Score

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        norms = jax.nn.softplus(self.of(ffn, x, tokens))
        return norms / jnp.maximum(norms.max(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


@pytree
@dataclass(frozen=True)
class Pooled(_Derived):
    """One decision for all tokens of an image, or of each window of consecutive tokens: the mean of their scores.

    Wang et al. 2025, "CoreMatching", for whole images: plain smaller matrix products, no ragged tiles.

    Attributes:
        of: the score that is averaged.
        odds: it is in log-odds; average the probabilities.
        window: tokens per window; None for whole images.
    """

    of: Score
    odds: bool = field(metadata={"static": True})
    window: int | None = field(default=None, metadata={"static": True})

    @property
    def traits(self) -> Traits:
        return self.of.traits._replace(granularity="image", tile_size=self.window)

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        scores = self.of(ffn, x, tokens)
        return mean_of_tokens(jax.nn.sigmoid(scores) if self.odds else scores, tokens, self.window)

    def of_groups(self, groups: np.ndarray) -> "Pooled":
        """See `SharedScore`; of scores that can be taken apart."""
        return dataclasses.replace(self, of=self.of.of_groups(groups))
