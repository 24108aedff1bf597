"""Means and covariances of activations: what closed-form fits need to know about the data."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moments:
    """Sums over tokens; of one batch in float32, of many in 64 bits.

    Attributes:
        tokens: () number of tokens.
        sums: (n,) of the activations.
        products: (n, n) of the activations' outer products.
    """

    tokens: jax.Array
    sums: jax.Array
    products: jax.Array

    def __add__(self, other: "Moments") -> "Moments":
        """The sum of two, in 64 bits."""
        return jax.tree.map(lambda a, b: np.asarray(a, np.float64) + np.asarray(b, np.float64), self, other)

    @property
    def mean(self) -> np.ndarray:
        """(n,)."""
        return np.asarray(self.sums, np.float64) / max(float(self.tokens), 1)

    @property
    def covariance(self) -> np.ndarray:
        """(n, n)."""
        return np.asarray(self.products, np.float64) / max(float(self.tokens), 1) - np.outer(self.mean, self.mean)


def moments_of(activations: jax.Array, tokens: jax.Array) -> Moments:
    """The moments of one batch; jittable.

    Args:
        activations: (batch, tokens, n).
        tokens: (batch, tokens) bool, false for padding.
    """
    kept = jnp.where(tokens[..., None], activations, 0).astype(jnp.float32).reshape(-1, activations.shape[-1])
    return Moments(tokens.sum(), kept.sum(0), jnp.matmul(kept.T, kept, precision="highest"))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossMoments:
    """Sums over observations of inputs and outputs; of one batch in float32, of many in 64 bits.

    Attributes:
        inputs: (n,) moments; their tokens are observations.
        output_sums: (m,) of the outputs.
        cross: (n, m) of the outer products of inputs and outputs.
    """

    inputs: Moments
    output_sums: jax.Array
    cross: jax.Array

    def __add__(self, other: "CrossMoments") -> "CrossMoments":
        """The sum of two, in 64 bits."""
        return jax.tree.map(lambda a, b: np.asarray(a, np.float64) + np.asarray(b, np.float64), self, other)

    @property
    def output_mean(self) -> np.ndarray:
        """(m,)."""
        return np.asarray(self.output_sums, np.float64) / max(float(self.inputs.tokens), 1)

    @property
    def cross_covariance(self) -> np.ndarray:
        """(n, m) of inputs and outputs."""
        products = np.asarray(self.cross, np.float64) / max(float(self.inputs.tokens), 1)
        return products - np.outer(self.inputs.mean, self.output_mean)


def cross_moments_of(inputs: jax.Array, outputs: jax.Array, counted: jax.Array) -> CrossMoments:
    """The moments of one batch; jittable.

    Args:
        inputs: (batch, observations, n).
        outputs: (batch, observations, m).
        counted: (batch, observations) bool, false for observations that do not count.
    """
    x, y = (
        jnp.where(counted[..., None], values, 0).astype(jnp.float32).reshape(-1, values.shape[-1])
        for values in (inputs, outputs)
    )
    return CrossMoments(moments_of(inputs, counted), y.sum(0), jnp.matmul(x.T, y, precision="highest"))
