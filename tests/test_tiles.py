"""Tiles of tokens: counts equal to a loop's, additive; an order that loses no token and brings alike ones together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detr_jax.kernels.token_sorting import SIGNATURE_BITS, SIGNATURE_SHARE, signature_order
from detr_jax.methods.tiles import count_tiles

IMAGES, TOKENS = 4, 11


def example(groups: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Groups of different popularity, and images with padding at the end, in between, and everywhere."""
    rng = np.random.default_rng(seed)
    active = rng.random((IMAGES, TOKENS, groups)) < rng.random(groups)
    tokens = np.ones((IMAGES, TOKENS), bool)
    tokens[1, 6:] = False
    tokens[2, [0, 4, 5]] = False
    tokens[3] = False
    return active, tokens


@pytest.mark.parametrize("tile_size", [1, 3, 4, TOKENS, 100])
def test_counts_are_those_of_a_loop(tile_size):
    active, tokens = example(6)
    pairs = needed = 0
    for image, exists in zip(active, tokens, strict=True):
        for start in range(0, TOKENS, tile_size):
            members = image[start : start + tile_size][exists[start : start + tile_size]]
            pairs += active.shape[-1] * bool(len(members))
            needed += members.any(0).sum()
    counts = jax.jit(count_tiles, static_argnames="tile_size")(active, tokens, tile_size=tile_size)
    assert (counts.pairs, counts.active) == (pairs, needed)
    assert counts.density == pytest.approx(needed / pairs)


def test_counts_of_batches_add_up():
    active, tokens = example(6)
    whole = count_tiles(active, tokens, 4)
    added = count_tiles(active[:1], tokens[:1], 4) + count_tiles(active[1:], tokens[1:], 4)
    assert (added.pairs, added.active) == (whole.pairs, whole.active)
    assert added.pairs.dtype == np.int64


def test_a_tile_has_a_token():
    with pytest.raises(ValueError, match="at least 1 token, not 0"):
        count_tiles(*example(6), 0)


def gray_words(bits: int) -> list[int]:
    """All words in Gray's order, by reflection."""
    words = [0]
    for bit in range(bits):
        words += [word | 1 << bit for word in reversed(words)]
    return words


def test_the_order_is_that_of_a_loop():
    active, tokens = example(7)
    place = {word: i for i, word in enumerate(gray_words(7))}
    orders = np.asarray(jax.jit(signature_order)(active, tokens))
    for image, exists, order in zip(active, tokens, orders, strict=True):
        share = image[exists].sum(0).astype(np.float32) / np.float32(max(exists.sum(), 1))
        telling = np.argsort(np.abs(share - np.float32(SIGNATURE_SHARE)), kind="stable")
        words = [int("".join("01"[int(needs)] for needs in token[telling]), 2) for token in image]
        keys = [place[word] if there else len(place) for word, there in zip(words, exists, strict=True)]
        np.testing.assert_array_equal(order, np.argsort(keys, kind="stable"))


@pytest.mark.parametrize("groups", [1, 6, SIGNATURE_BITS, 80])
def test_no_token_is_lost_and_padding_comes_last(groups):
    active, tokens = example(groups, seed=groups)
    active[0] = True  # signatures of ones only come before padding too
    order = np.asarray(signature_order(active, tokens))
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(TOKENS), (IMAGES, 1)))
    ordered = np.take_along_axis(tokens, order, 1)
    np.testing.assert_array_equal(ordered, np.arange(TOKENS) < tokens.sum(1, keepdims=True))


def test_the_order_lowers_the_density_where_tokens_come_in_kinds():
    kinds = np.random.default_rng(0).permuted(np.tile(np.repeat(np.arange(4), 16), (3, 1)), axis=1)
    needs = np.eye(4, dtype=bool).repeat(10, axis=1)
    active, tokens = needs[kinds], np.ones(kinds.shape, bool)
    order = signature_order(active, tokens)
    assert count_tiles(active, tokens, 16).density > 0.9
    assert count_tiles(jnp.take_along_axis(active, order[..., None], 1), tokens, 16).density == 0.25
