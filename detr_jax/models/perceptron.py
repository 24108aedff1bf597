"""Linear layers with ReLUs between them, the heads of detectors."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


class Perceptron(nnx.Module):
    """(..., sizes[0]) -> (..., sizes[-1])."""

    def __init__(self, sizes: Sequence[int], *, dtype: jnp.dtype | None = None, rngs: nnx.Rngs):
        pairs = itertools.pairwise(sizes)
        self.layers = nnx.List([nnx.Linear(before, after, dtype=dtype, rngs=rngs) for before, after in pairs])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)
