"""The part of an FFN that is computed, and what decides it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import jax

from detr_jax.kernels import Execution, FFNWeights


class LowRankFactors(NamedTuple):
    """Both matrices of an FFN as products of rank r, a cheap stand-in for what is left out.

    Attributes:
        in_neurons: (F, r), with `in_model` about W_in.
        in_model: (r, d).
        out_neurons: (F, r), with `out_model` about W_out.
        out_model: (r, d).
    """

    in_neurons: jax.Array
    in_model: jax.Array
    out_neurons: jax.Array
    out_model: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Selection:
    """The part of an FFN that is computed exactly.

    Attributes:
        active: (..., tokens, G) bool, the groups of F / G consecutive hidden neurons; None for all of them.
        channels: (..., tokens, d) bool, the channels of x that enter the first product; None for all of them.
        factors: what stands in for the rest; None leaves it out.
        execution: how the FFN is computed without the rest; None for the masked reference.
    """

    active: jax.Array | None = None
    channels: jax.Array | None = None
    factors: LowRankFactors | None = None
    execution: Execution | None = field(default=None, metadata={"static": True})


class Selector(Protocol):
    """Decides which part of an FFN is computed. A pytree, so that it passes through `jax.jit`."""

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> Selection:
        """Selects.

        Args:
            ffn: the FFN; selectors that look at hidden activations compute them.
            x: (..., tokens, d) inputs of the FFN.
            tokens: (..., tokens) bool, false for padding.
        """


Selectors = Mapping[str, Selector]
"""Selector of each sparse FFN by name ("encoder.0"); an FFN without one is dense."""
