"""Trained scores that look at the FFN's input: the gates of MGS and of Deja Vu."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.errors import InputError
from detr_jax.methods.base import Traits
from detr_jax.methods.pooled_gate import ContributionGate, PooledGate
from detr_jax.models import FFNWeights
from detr_jax.pytrees import pytree


@pytree
@dataclass(frozen=True)
class LinearGate:
    """One linear layer, in log-odds that a group is needed: MGS (Sedghi et al. 2025, arXiv 2510.09380).

    Attributes:
        kernel: (d, G) float32.
        bias: (G,) float32.
    """

    traits: ClassVar = Traits("training", "group", "both")

    kernel: jax.Array
    bias: jax.Array

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) @ self.kernel + self.bias

    def cost(self, d_model: int, features: int) -> float:
        return float(self.kernel.size)


@pytree
@dataclass(frozen=True)
class LowRankGate:
    """Two linear layers with nothing between them: Deja Vu (Liu et al. 2023).

    Attributes:
        down: (d, r) float32.
        up: (r, G) float32.
        bias: (G,) float32.
    """

    traits: ClassVar = Traits("training", "group", "both")

    down: jax.Array
    up: jax.Array
    bias: jax.Array

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) @ self.down @ self.up + self.bias

    def cost(self, d_model: int, features: int) -> float:
        return float(self.down.size + self.up.size)


Gate = LinearGate | LowRankGate | PooledGate | ContributionGate


def log_odds(probability: float) -> float:
    """The threshold on a gate's scores that is a probability; 0 and 1 are minus and plus infinity.

    Raises:
        ValueError: if it is no probability.
    """
    if not 0 <= probability <= 1:
        raise InputError(f"a threshold must be a probability, not {probability}")
    with np.errstate(divide="ignore"):
        return float(np.log(probability) - np.log1p(-np.float64(probability)))
