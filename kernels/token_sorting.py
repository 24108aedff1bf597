"""An order of tokens in which those come together that need the same groups of neurons."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

SIGNATURE_BITS = 31
# What half of the tokens need, every large tile needs in any order; what few need can be kept to few tiles.
SIGNATURE_SHARE = 0.2


def signature_order(
    active: Bool[Array, "images tokens G"], tokens: Bool[Array, "images tokens"]
) -> Int[Array, "images tokens"]:
    """An order of each image's tokens in which those come together that need the same groups; jittable.

    A token's signature says which of `SIGNATURE_BITS` groups it needs, those needed by closest to `SIGNATURE_SHARE` of
    the image's tokens, the closest one first. Tokens are sorted by it as by a Gray code, in which neighbours differ in
    few bits: a key of 32 bits and a sort, cheap enough before a kernel.

    Args:
        active: the groups that each token needs.
        tokens: false for padding.

    Returns:
        The token that comes to each place; padding comes last.
    """
    needed = active & tokens[..., None]
    share = needed.sum(1) / jnp.maximum(tokens.sum(1), 1)[:, None]
    bits = min(SIGNATURE_BITS, active.shape[-1])
    _, telling = jax.lax.top_k(-jnp.abs(share - SIGNATURE_SHARE), bits)
    signature = jnp.take_along_axis(needed, telling[:, None], axis=2).astype(jnp.uint32)
    key = (signature << jnp.arange(bits - 1, -1, -1, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32)
    for shift in (1, 2, 4, 8, 16):  # the place of a code word in Gray's order
        key ^= key >> shift
    return jnp.argsort(jnp.where(tokens, key, jnp.uint32(2**32 - 1)), axis=1)
