"""The part of an FFN that is computed, and what decides it."""

from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.kernels import Execution, Experts, FFNWeights, expand_groups, repeat_per_tile
from detr_jax.pytrees import pytree


class LowRankFactors(NamedTuple):
    """W_in and W_out (F, d) of an FFN as products of (F, r) and (r, d), a cheap stand-in for what is left out."""

    in_neurons: jax.Array
    in_model: jax.Array
    out_neurons: jax.Array
    out_model: jax.Array


class OutputLayer(NamedTuple):
    """A second layer in place of an FFN's own, fitted to what is left of the hidden neurons."""

    w_out: jax.Array
    """(n, d) rows of the neurons that may be computed, all F of them or those of the first two sections."""
    b_out: jax.Array
    """(d,)."""


class Routed(NamedTuple):
    """Narrow experts in place of an FFN, and the expert of each token."""

    experts: Experts
    """C of them."""
    neurons: tuple[jax.Array, ...]
    """(n, k) int32 of each stack of experts, the hidden neurons of the FFN that they have."""
    assignment: jax.Array
    """(..., tokens) int32, C for padding."""

    def per_token(self, features: int) -> jax.Array:
        """(..., tokens, F) bool, the hidden neurons that each token gets."""
        count = len(self.experts.b_out)
        members = jnp.zeros((count + 1, features), bool)
        for first, neurons in zip(self.experts.first, self.neurons, strict=True):
            members = members.at[first + jnp.arange(len(neurons))[:, None], neurons].set(True)
        return members[self.assignment]


class Partition(NamedTuple):
    """The hidden neurons of an FFN in three parts, in this order; the rest is never computed."""

    always: int
    """Neurons that are computed for every token."""
    gated: int
    """Neurons that a selector decides about."""

    def parts(self, weights: FFNWeights) -> tuple[FFNWeights, FFNWeights]:
        """The FFN of the neurons that are always computed, and that of the gated ones, which has no bias."""
        always, end, bias = self.always, self.always + self.gated, weights.b_out
        of_always = FFNWeights(weights.w_in[:always], weights.b_in[:always], weights.w_out[:always], bias)
        w_in, b_in, w_out = (array[always:end] for array in weights[:3])
        return of_always, FFNWeights(w_in, b_in, w_out, jnp.zeros_like(bias))


@pytree
class Selection:
    """The part of an FFN that is computed exactly."""

    active: jax.Array | None = None
    """(..., decisions, G) bool, the groups of consecutive hidden neurons, all or the gated section's; None for all."""
    channels: jax.Array | None = None
    """(..., tokens, d) bool, the channels of x that enter the first product; None for all of them."""
    factors: LowRankFactors | None = None
    """What stands in for the rest; None leaves it out."""
    second: OutputLayer | None = None
    """A second layer that makes up for what is left out; None for the FFN's own."""
    mask: jax.Array | None = None
    """(..., tokens, G) float, the values of `active`, through which gates get a gradient while they are trained."""
    routed: Routed | None = None
    """Narrow experts, which are computed instead of all of this; None for none."""
    tile_size: int | None = field(default=1, metadata={"static": True})
    """Consecutive tokens that a decision is about; None for all tokens of an image."""
    sections: Partition | None = field(default=None, metadata={"static": True})
    """Of the neurons, if not all of them are gated."""
    execution: Execution | None = field(default=None, metadata={"static": True})
    """How the FFN is computed without the rest; None for the masked reference, and for the fastest one of experts."""

    def per_token(self, shape: tuple[int, ...], features: int) -> jax.Array | None:
        """`(*shape, G)` bool, or `(*shape, F)` with sections or experts: what each token gets; None for everything.

        `shape` is (..., tokens) of the FFN's inputs, `features` F.
        """
        if self.routed is not None:
            return self.routed.per_token(features)
        active = self.active
        if active is not None and self.tile_size != 1:
            active = repeat_per_tile(active, shape[-1], self.tile_size)
        if self.sections is None:
            return active
        always, gated = self.sections
        if active is None:
            active = jnp.ones((*shape, 1), bool)
        computed, never = jnp.ones((*shape, always), bool), jnp.zeros((*shape, features - always - gated), bool)
        return jnp.concatenate([computed, expand_groups(active, gated), never], axis=-1)


class Selector(Protocol):
    """Decides which part of an FFN is computed. A pytree, so that it passes through `jax.jit`."""

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> Selection:
        """Selects for the inputs x (..., tokens, d) of an FFN; `tokens` (..., tokens) bool is false for padding."""


Selectors = Mapping[str, Selector]
"""Selector of each sparse FFN by name ("encoder.0"); an FFN without one is dense."""


class Permutations:
    """Permutations of hidden neurons by name of the FFN, identities left out; compared by value, so static for a jit.

    Each of the `arrays` (F,) has the neuron that comes to each place.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        found = {name: np.asarray(array, np.int64) for name, array in sorted(arrays.items())}
        self.arrays = {name: a for name, a in found.items() if not np.array_equal(a, np.arange(len(a)))}
        self._content = tuple((name, a.tobytes()) for name, a in self.arrays.items())

    def then(self, others: Mapping[str, np.ndarray]) -> "Permutations":
        """The composition of these, and after them others."""
        composed = {name: self.arrays[name][array] if name in self.arrays else array for name, array in others.items()}
        return Permutations(self.arrays | composed)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Permutations) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)


class PlanSelectors(dict[str, Selector]):
    """The selectors of a plan by name, with its permutations; detectors with other permutations refuse them."""

    def __init__(self, selectors: Selectors, permutations: Permutations):
        super().__init__(selectors)
        self.permutations = permutations


def _flatten(selectors: PlanSelectors) -> tuple[tuple[Any, ...], tuple[tuple[str, ...], Permutations]]:
    names = tuple(sorted(selectors))
    children = tuple((jax.tree_util.DictKey(name), selectors[name]) for name in names)
    return children, (names, selectors.permutations)


def _unflatten(static: tuple[tuple[str, ...], Permutations], children: Iterable[Selector]) -> PlanSelectors:
    names, permutations = static
    return PlanSelectors(dict(zip(names, children, strict=True)), permutations)


jax.tree_util.register_pytree_with_keys(PlanSelectors, _flatten, _unflatten)
