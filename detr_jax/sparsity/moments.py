"""Mean and covariance of the inputs of an FFN: all that a sketch needs to know about the data."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.model import FFNTrace


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InputMoments:
    """Sums over the tokens of an FFN; of one batch in float32, of many in 64 bits.

    Attributes:
        tokens: () number of tokens.
        sums: (d,) of the inputs.
        products: (d, d) of the inputs' outer products.
    """

    tokens: jax.Array
    sums: jax.Array
    products: jax.Array

    def __add__(self, other: "InputMoments") -> "InputMoments":
        """The sum of two, in 64 bits."""
        return jax.tree.map(lambda a, b: np.asarray(a, np.float64) + np.asarray(b, np.float64), self, other)

    @property
    def mean(self) -> np.ndarray:
        """(d,)."""
        return np.asarray(self.sums, np.float64) / max(float(self.tokens), 1)

    @property
    def covariance(self) -> np.ndarray:
        """(d, d)."""
        return np.asarray(self.products, np.float64) / max(float(self.tokens), 1) - np.outer(self.mean, self.mean)


def moments_of(trace: FFNTrace) -> InputMoments:
    """The moments of one batch; jittable."""
    x = jnp.where(trace.tokens[..., None], trace.inputs, 0).astype(jnp.float32).reshape(-1, trace.inputs.shape[-1])
    return InputMoments(trace.tokens.sum(), x.sum(0), jnp.matmul(x.T, x, precision="highest"))
