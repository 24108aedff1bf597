"""Token gates: which image tokens the encoder's layers update, by a score for each token (Sparse DETR and others).

What is done here is what a frozen detector allows: a scorer is trained on labels that the detector itself gives. No
auxiliary loss on the encoder's tokens (Roh et al. 2022), no second attention among the kept ones (Zheng et al. 2023,
Focus-DETR), no layers between levels (Li et al. 2023, Lite DETR).
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from detr_jax.errors import InputError, require_choices, require_counts
from detr_jax.methods.base import storable

Scorer = Literal["linear", "sparse-detr", "levels", "random"]
Labels = Literal["attention", "update"]
EPSILON = 1e-5


class TokenScore(Protocol):
    """Need for each image token; higher is updated sooner. A pytree."""

    def __call__(self, x: jax.Array, tokens: jax.Array, levels: Sequence[int]) -> jax.Array:
        """(batch, tokens) float32; arguments as of `detr_jax.models.token_selection.TokenSelector`."""


@storable
class LinearTokenScore:
    """Log-odds x w + b."""

    weights: jax.Array
    """(d,)."""
    bias: jax.Array
    """()."""

    def __call__(self, x: jax.Array, tokens: jax.Array, levels: Sequence[int]) -> jax.Array:
        return x.astype(jnp.float32) @ self.weights + self.bias


@storable
class DenseLayer:
    """x W + b."""

    kernel: jax.Array
    """(inputs, outputs)."""
    bias: jax.Array
    """(outputs,)."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel + self.bias


@storable
class SparseDetrTokenScore:
    """Sparse DETR's scorer (Roh et al. 2022, section 3.1): half of a token's features are the mean over the image."""

    scale: jax.Array
    """(d,) of the layer norm."""
    shift: jax.Array
    """(d,)."""
    first: DenseLayer
    layers: tuple[DenseLayer, ...]

    def __call__(self, x: jax.Array, tokens: jax.Array, levels: Sequence[int]) -> jax.Array:
        x = jax.nn.standardize(x.astype(jnp.float32), epsilon=EPSILON) * self.scale + self.shift
        x = jax.nn.gelu(self.first(x), approximate=False)
        own, shared = jnp.split(x, 2, axis=-1)
        counted = tokens[..., None].astype(jnp.float32)
        mean = (shared * counted).sum(1, keepdims=True) / jnp.maximum(counted.sum(1, keepdims=True), 1)
        x = jnp.concatenate([own, jnp.broadcast_to(mean, shared.shape)], axis=-1)
        for layer in self.layers[:-1]:
            x = jax.nn.gelu(layer(x), approximate=False)
        return self.layers[-1](x)[..., 0]


@storable
class LevelTokenScore:
    """Coarse levels before fine ones, whatever the image (the schedule of Lite DETR, Li et al. 2023)."""

    def __call__(self, x: jax.Array, tokens: jax.Array, levels: Sequence[int]) -> jax.Array:
        of_level = [jnp.full(count, index, jnp.float32) for index, count in enumerate(levels)]
        return jnp.broadcast_to(jnp.concatenate(of_level), tokens.shape)


@storable
class RandomTokenScore:
    """The same random order of the places for all images: a control."""

    seed: int = field(default=0, metadata={"static": True})

    def __call__(self, x: jax.Array, tokens: jax.Array, levels: Sequence[int]) -> jax.Array:
        return jnp.broadcast_to(jax.random.uniform(jax.random.key(self.seed), tokens.shape[1:]), tokens.shape)


@storable
class GatedTokens:
    """The selector of the tokens that score highest, a share of them in each layer; for `selectors["encoder"]`."""

    score: TokenScore
    keep: tuple[float, ...] = field(metadata={"static": True})
    """Shares of an image's tokens, padding included, one for each layer or one for all."""

    computation = "gathered"
    """Name in reports of the way in which layers are computed."""

    def counts(self, tokens: int, layers: int) -> tuple[int, ...]:
        """See `TokenSelector`; raises an InputError if there are shares for another number of layers."""
        if len(self.keep) not in (1, layers):
            raise InputError(f"there are {len(self.keep)} shares of tokens to keep for {layers} encoder layers")
        shares = self.keep * layers if len(self.keep) == 1 else self.keep
        return tuple(min(tokens, max(1, math.ceil(share * tokens - 1e-9))) for share in shares)

    def __call__(self, x: jax.Array, tokens: jax.Array, levels: Sequence[int]) -> jax.Array:
        return self.score(x, tokens, levels)

    def keeping(self, *keep: float) -> "GatedTokens":
        """The same with other shares."""
        return dataclasses.replace(self, keep=keep)


@dataclass(frozen=True)
class TokenGates:
    """Choice of the image tokens that the encoder's layers update.

    Raises:
        InputError: if a share is not above 0 and at most 1, or an option does not exist.
    """

    keep: tuple[float, ...] = (0.3,)
    """Shares of the tokens: one for all layers, or one for each layer; the same order of tokens serves all, so that
    sets are nested."""
    scorer: Scorer = "linear"
    """linear, or sparse-detr for Sparse DETR's; levels (coarse before fine) and random are controls, not trained."""
    labels: Labels = "attention"
    """Measure of the tokens that are looked for: attention of the decoder in all layers, heads and queries, as in
    Sparse DETR, or update, the norm of what the encoder's layers change."""
    label_share: float | None = None
    """Share of the tokens that are looked for; None for the largest of `keep`."""
    epochs: int = 3
    """Passes over the training images."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam, which decays to 0 along a cosine."""
    seed: int = 0
    """Of the order of the images, and of the scorer's first values."""

    def __post_init__(self) -> None:
        require_counts(self, "epochs")
        require_choices(self, "scorer", "labels")
        shares = (*self.keep, *([] if self.label_share is None else [self.label_share]))
        if not self.keep or not all(0 < share <= 1 for share in shares):
            raise InputError(f"shares of tokens are above 0 and at most 1, at least one of them, not {shares}")

    @property
    def is_trained(self) -> bool:
        return self.scorer in ("linear", "sparse-detr")

    @property
    def wanted(self) -> float:
        """Share of the tokens that are looked for."""
        return max(self.keep) if self.label_share is None else self.label_share

    def init(self, d_model: int) -> TokenScore:
        """The score before training."""
        if self.scorer == "levels":
            return LevelTokenScore()
        if self.scorer == "random":
            return RandomTokenScore(self.seed)
        if self.scorer == "linear":
            return LinearTokenScore(jnp.zeros(d_model), jnp.zeros(()))
        sizes = (d_model, d_model, max(d_model // 2, 1), max(d_model // 4, 1), 1)
        keys = jax.random.split(jax.random.key(self.seed), len(sizes) - 1)
        make = jax.nn.initializers.glorot_uniform()
        first, *others = (
            DenseLayer(make(key, (before, after)), jnp.zeros(after))
            for key, before, after in zip(keys, sizes[:-1], sizes[1:], strict=True)
        )
        return SparseDetrTokenScore(jnp.ones(d_model), jnp.zeros(d_model), first, tuple(others))


def token_loss(
    score: TokenScore, x: jax.Array, tokens: jax.Array, levels: Sequence[int], wanted: jax.Array
) -> jax.Array:
    """Binary cross-entropy () with `wanted` (batch, tokens) bool, sum over tokens that exist (Roh et al. 2022)."""
    scores = score(x, tokens, levels)
    loss = jax.nn.softplus(jnp.where(wanted, -scores, scores))
    return jnp.where(tokens, loss, 0).sum()


def most_important(importance: jax.Array, tokens: jax.Array, share: float) -> jax.Array:
    """(batch, tokens) bool, the tokens of highest importance (batch, tokens), a share of those that exist."""
    ranked = jnp.where(tokens, importance, -jnp.inf)
    place = jnp.argsort(jnp.argsort(-ranked, axis=1), axis=1)
    return (place < jnp.ceil(share * tokens.sum(1, keepdims=True) - 1e-6)) & tokens
