"""Random inputs and gates for timing the sparse FFN: how dense the maps are, and how alike what neighbours need."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.errors import InputError
from detr_jax.kernels import any_per_tile, signature_order


def random_inputs(tokens: int, d_model: int, correlation: float | None) -> jax.Array:
    """Inputs (tokens, d) of unit variance.

    Args:
        tokens: how many.
        d_model: d.
        correlation: r from 0 to 1 makes each token a step of a stationary process, x_t = r x_(t-1) + sqrt(1 - r^2) e_t
            with independent normal e_t: what a linear gate says about neighbours correlates by r, about tokens n apart
            by r^n; with 0 tokens are independent. None gives all tokens a common part of half of the variance instead,
            and neighbours nothing more in common than others.

    Raises:
        ValueError: if the correlation is not from 0 to 1.
    """
    own = jax.random.normal(jax.random.key(3), (tokens, d_model))
    if correlation is None:
        return (jax.random.normal(jax.random.key(2), (d_model,)) + own) / np.sqrt(2)
    if not 0 <= correlation <= 1:
        raise InputError(f"the correlation of neighbours must be from 0 to 1, not {correlation}")
    steps = np.array(own)
    steps[1:] *= np.sqrt(1 - correlation**2)
    for t in range(1, tokens):
        steps[t] += correlation * steps[t - 1]
    return jnp.asarray(steps)


@dataclass(frozen=True)
class RandomGate:
    """A linear gate with a random kernel (d, B) and one threshold; all methods can be jitted.

    Attributes:
        tile_size: tokens per tile.
        decides: for whom: "tile" looks at the mean of its inputs, "token" at each, and a tile unites its tokens.
        ordered: whether tokens come into the order of `kernels.signature_order` before tiles unite them.
    """

    tile_size: int
    decides: Literal["tile", "token"]
    ordered: bool = False

    def scores(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """What is compared with the threshold: (tiles, B) or (tokens, B), float32."""
        product = partial(jnp.matmul, preferred_element_type=jnp.float32)
        if self.decides == "token":
            return product(x, kernel)
        count = -(-len(x) // self.tile_size)
        padded = jnp.pad(x, ((0, count * self.tile_size - len(x)), (0, 0))).reshape(count, self.tile_size, -1)
        return product(padded.mean(1, dtype=jnp.float32).astype(x.dtype), kernel)

    def decide(self, x: jax.Array, kernel: jax.Array, threshold: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """(tiles, B) bool, what tiles need; and if `ordered`, (tokens,) the token that comes to each place in them."""
        decided = self.scores(x, kernel) >= threshold
        if self.decides == "tile":
            return decided, None
        order = signature_order(decided[None], decided.any(-1)[None])[0] if self.ordered else None
        in_order = decided if order is None else decided[order]
        return any_per_tile(in_order, self.tile_size, decided.shape[-1]), order

    def threshold(self, x: jax.Array, kernel: jax.Array, density: float, of: Literal["tiles", "tokens"]) -> jax.Array:
        """() the threshold that gives a density, far from any score, so that no rounding decides.

        Args:
            x: (tokens, d).
            kernel: (d, B).
            density: share of the pairs with a block.
            of: "tiles" that need it, in the order in which tokens come; or "tokens" that do.
        """
        scores = np.asarray(self.scores(x, kernel))
        if of == "tiles" and self.decides == "token":  # a tile needs what its highest score needs
            scores = np.pad(scores, ((0, -len(scores) % self.tile_size), (0, 0)), constant_values=-np.inf)
            scores = scores.reshape(-1, self.tile_size, scores.shape[-1]).max(1)
        descending = np.concatenate([[np.inf], np.sort(scores, axis=None)[::-1], [-np.inf]])
        count = round(density * scores.size)
        return jnp.float32(descending[count : count + 2].mean())
