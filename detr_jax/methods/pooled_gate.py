"""Trained scores that decide for many tokens at once, from pooled features or from what each token would need."""

import dataclasses
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.methods.base import Traits
from detr_jax.methods.sketch import Sketch
from detr_jax.methods.tiles import mean_of_tokens
from detr_jax.models import FFNWeights
from detr_jax.pytrees import pytree

_SHARPNESS = 4.0
"""Of a gate that starts from a sketch: a hidden activation of 1 is so many units of softplus, which is 0.7 at 0."""


class _Shared:
    """What both kinds have."""

    down: jax.Array
    up: jax.Array
    bias: jax.Array
    window: int | None

    @property
    def traits(self) -> Traits:
        return Traits("training", "image", "both", tile_size=self.window)

    def of_groups(self, groups: np.ndarray):
        """See `SharedScore`."""
        return dataclasses.replace(self, up=self.up[:, groups], bias=self.bias[groups])


@pytree
@dataclass(frozen=True)
class PooledGate(_Shared):
    """The mean over tokens of relu(x D + c), then one linear layer.

    Ours, after the pooled gates of Gao et al. 2024, "SeerAttention". The second layer runs once for all tokens.

    Attributes:
        down: (d, r) float32.
        shift: (r,) float32.
        up: (r, G) float32.
        bias: (G,) float32.
        window: consecutive tokens of a decision; None for all of an image.
    """

    down: jax.Array
    shift: jax.Array
    up: jax.Array
    bias: jax.Array
    window: int | None = field(default=None, metadata={"static": True})

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        features = jax.nn.relu(x.astype(jnp.float32) @ self.down + self.shift)
        return mean_of_tokens(features, tokens, self.window) @ self.up + self.bias

    def cost(self, d_model: int, features: int) -> float:
        # The second layer is shared by the tokens of an image, whose number is not known here, and not counted there.
        return float(self.down.size + (self.up.size / self.window if self.window else 0))


@pytree
@dataclass(frozen=True)
class ContributionGate(_Shared):
    """The logarithm of the mean over tokens of what each of them needs of a group: softplus(x D U + b), of low rank.

    Ours: the gate of Liu et al. 2023, "Deja Vu", as a guess of contributions that add up.

    Attributes:
        down: (d, r) float32.
        up: (r, G) float32.
        bias: (G,) float32.
        window: consecutive tokens of a decision; None for all of an image.
    """

    down: jax.Array
    up: jax.Array
    bias: jax.Array
    window: int | None = field(default=None, metadata={"static": True})

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> jax.Array:
        needed = jax.nn.softplus(x.astype(jnp.float32) @ self.down @ self.up + self.bias)
        return jnp.log(mean_of_tokens(needed, tokens, self.window) + jnp.finfo(jnp.float32).tiny)

    def cost(self, d_model: int, features: int) -> float:
        return float(self.down.size + self.up.size)

    @classmethod
    def from_sketch(cls, sketch: Sketch) -> "ContributionGate":
        """The gate that says what a sketch of single neurons says, up to the rounding of softplus at 0; to train on.

        Raises:
            ValueError: if the sketch is of groups, whose contributions are sums that one softplus cannot be.
        """
        if sketch.group_size != 1:
            raise ValueError(f"a gate can start from a sketch of single neurons, not of groups of {sketch.group_size}")
        scale = _SHARPNESS / jnp.maximum(jnp.mean(sketch.norms), jnp.finfo(jnp.float32).tiny) * sketch.norms
        return cls(sketch.down, sketch.up * scale, sketch.bias * scale)
