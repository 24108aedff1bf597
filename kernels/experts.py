"""Narrow experts in place of an FFN: the definition that every kernel must match, and the grouping of tokens.

Notation (d model features; expert c has k_c neurons; a(t) is the expert of token t)::

    h = relu(x_t W_in,c^T + b_in,c)   W_in,c  (k_c, d), c = a(t)
    y_t = h W_out,c + b_out,c         W_out,c (k_c, d)

A token of no expert, a(t) = C, gets 0.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


class Experts(NamedTuple):
    """C narrow FFNs, in stacks of equal width; experts are numbered through all stacks.

    Attributes:
        w_in: (n, k, d) of each stack, neurons on rows.
        b_in: (n, k) of each stack.
        w_out: (n, k, d) of each stack.
        b_out: (C, d).
    """

    w_in: tuple[Float[Array, "n k d"], ...]
    b_in: tuple[Float[Array, "n k"], ...]
    w_out: tuple[Float[Array, "n k d"], ...]
    b_out: Float[Array, "C d"]

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons of each expert."""
        return tuple(itertools.chain(*((stack.shape[1],) * stack.shape[0] for stack in self.w_in)))

    @property
    def first(self) -> tuple[int, ...]:
        """The first expert of each stack."""
        sizes = [stack.shape[0] for stack in self.w_in]
        return tuple(itertools.accumulate(sizes, initial=0))[:-1]


def routed_ffn(
    x: Float[Array, "*batch d"], experts: Experts, assignment: Int[Array, "*batch"]
) -> Float[Array, "*batch d"]:
    """The definition, which computes every expert for every token."""
    count = len(experts.b_out)
    outputs = jnp.where((assignment < count)[..., None], experts.b_out[jnp.minimum(assignment, count - 1)], 0)
    for first, w_in, b_in, w_out in zip(experts.first, *experts[:3], strict=True):
        own = assignment[..., None] == first + jnp.arange(len(w_in))
        hidden = jax.nn.relu(jnp.einsum("...d,nkd->...nk", x, w_in) + b_in)
        outputs += jnp.einsum("...nk,nkd->...d", jnp.where(own[..., None], hidden, 0), w_out)
    return outputs.astype(x.dtype)


def pad_neurons(stack: Shaped[Array, "n _ *rest"], width: int, value: int = 0) -> Shaped[Array, "n width *rest"]:
    """Experts of a stack filled up to a width."""
    pad = ((0, 0), (0, width - stack.shape[1]), *[(0, 0)] * (stack.ndim - 2))
    return jnp.pad(stack, pad, constant_values=value)


def join_rows(stacks: Sequence[Shaped[Array, "_ _ *rest"]], multiple: int) -> Shaped[Array, "rows *rest"]:
    """Neurons of all experts below each other, those of each padded with zeros to a multiple."""
    padded = (pad_neurons(s, s.shape[1] + -s.shape[1] % multiple) for s in stacks)
    return jnp.concatenate([s.reshape(-1, *s.shape[2:]) for s in padded])


class TokenGroups(NamedTuple):
    """Tokens brought together by expert.

    Attributes:
        order: (T,) int32, the token at each place: those of expert 0 first, in their own order.
        ends: (C,) int32, the place behind the last token of each expert. Tokens of no expert come last.
    """

    order: Int[Array, " T"]
    ends: Int[Array, " C"]


def group_tokens(assignment: Int[Array, " T"], experts: int) -> TokenGroups:
    """Groups tokens by one sort; jittable, exact for any number of tokens. Ids from `experts` on are of no expert."""
    tokens = assignment.shape[0]
    ids = jnp.minimum(assignment, experts).astype(jnp.uint32)
    counts = (ids[:, None] == jnp.arange(experts, dtype=jnp.uint32)).sum(0, dtype=jnp.int32)
    bits = max(tokens - 1, 1).bit_length() if isinstance(tokens, int) else 32  # a symbol of `jax.export` has no length
    if experts.bit_length() + bits > 32:
        order = jnp.argsort(ids, stable=True)
    else:  # one key of expert and token sorts several times as fast as pairs
        keys = jax.lax.sort((ids << bits) | jnp.arange(tokens, dtype=jnp.uint32))
        order = keys & ((1 << bits) - 1)
    return TokenGroups(order.astype(jnp.int32), jnp.cumsum(counts, dtype=jnp.int32))
