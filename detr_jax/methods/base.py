"""Selectors that give every group, neuron or channel a score and keep what reaches a threshold."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.errors import InputError
from detr_jax.models import FFNWeights, Selection, Selector
from detr_jax.pytrees import pytree


class Traits(NamedTuple):
    """What one has to know of a method before comparing it.

    Attributes:
        needs: what it is made from.
        granularity: what it decides about: hidden neurons, groups of them, channels of the FFN's input, or groups for
            all tokens of an image or window at once.
        saves: which of the two matrix products become smaller.
        dynamic: whether it depends on the input.
        tile_size: consecutive tokens that one decision is about; None for all tokens of an image.
    """

    needs: Literal["nothing", "statistics", "training"]
    granularity: Literal["neuron", "group", "channel", "image"]
    saves: Literal["both", "first", "second"]
    dynamic: bool = True
    tile_size: int | None = 1


class Score(Protocol):
    """How much a part of an FFN is needed; higher is kept sooner. A pytree."""

    @property
    def traits(self) -> Traits: ...

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        """(..., decisions, G) float32, of channels (..., tokens, d); arguments as of a selector."""

    def cost(self, d_model: int, features: int) -> float:
        """Multiply-adds per token that the score itself takes, beyond the parts of the FFN that it makes use of."""


class SharedScore(Score, Protocol):
    """A score that decides for many tokens at once, and of which a part can be taken."""

    def of_groups(self, groups: np.ndarray) -> "SharedScore":
        """The score of some groups, (k,) indices, as of an FFN that has no others."""


@pytree
@dataclass(frozen=True)
class Thresholded:
    """The selector "score >= threshold". Calibration sets the threshold, see `sparsity.calibration`.

    Attributes:
        score: of the method.
        threshold: () float32; minus infinity computes everything.
    """

    score: Score
    threshold: jax.Array

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> Selection:
        return selection_of(self.score, self.score(ffn, x, tokens) >= self.threshold)

    @property
    def traits(self) -> Traits:
        return self.score.traits

    def cost(self, d_model: int, features: int) -> float:
        """Multiply-adds per token of the decision."""
        return self.score.cost(d_model, features)

    def at(self, threshold: float) -> "Thresholded":
        """The same with another threshold.

        Raises:
            ValueError: if it is NaN.
        """
        if threshold != threshold:
            raise InputError("a threshold cannot be NaN")
        return dataclasses.replace(self, threshold=jnp.float32(threshold))


def at_threshold(selector: Selector, threshold: float) -> Selector:
    """The same selector with another threshold, wherever in it that is.

    Raises:
        ValueError: if it decides by no threshold, or the threshold is NaN.
    """
    if isinstance(selector, Thresholded):
        return selector.at(threshold)
    for field in ("of", "selector", "gate"):
        if getattr(selector, field, None) is not None:
            return dataclasses.replace(selector, **{field: at_threshold(getattr(selector, field), threshold)})
    raise InputError(f"{type(selector).__name__} decides by no threshold")


def selection_of(score: Score, kept: jax.Array) -> Selection:
    """The selection of what a score decides about."""
    if score.traits.granularity == "channel":
        return Selection(channels=kept)
    return Selection(active=kept, tile_size=score.traits.tile_size)


def ordered_bits(numbers: jax.Array) -> jax.Array:
    """float32 -> uint32 in the same order, zeros of both signs alike."""
    bits = jax.lax.bitcast_convert_type(jnp.where(numbers == 0, 0, numbers).astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits < sign, bits | sign, ~bits)


def group_sums(per_neuron: jax.Array, groups: int) -> jax.Array:
    """(..., F) -> (..., G), the sum over each group of consecutive neurons."""
    return per_neuron.reshape(*per_neuron.shape[:-1], groups, -1).sum(-1)
