"""Random FFNs with maps of what their tiles need, their definition, and when two outputs count as equal."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.kernels import Experts, FFNWeights, dispatch, reference

definition = jax.jit(reference.block_sparse_ffn, static_argnames="tile_size")


def random_case(seed, *, batch=(), tokens=37, d=24, features=96, tile=16, blocks=12, share=0.4, dtype=jnp.float32):
    """Random inputs, weights and a map, new ones for every seed."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    weights = FFNWeights(
        normal(features, d) / np.sqrt(d).astype(dtype), normal(features) / 2, normal(features, d) / 8, normal(d)
    )
    needed = jnp.asarray(rng.random((*batch, -(-tokens // tile), blocks)) < share)
    return normal(*batch, tokens, d), weights, needed


def random_experts(stacks, d, dtype=jnp.float32, seed=0):
    """Random narrow experts, in stacks of (experts, neurons)."""
    rng = np.random.default_rng(seed)

    def random(*shape):
        return jnp.asarray(rng.standard_normal(shape) / 2, dtype)

    return Experts(
        tuple(random(n, k, d) for n, k in stacks),
        tuple(random(n, k) for n, k in stacks),
        tuple(random(n, k, d) for n, k in stacks),
        random(sum(n for n, _ in stacks), d),
    )


def random_routed_inputs(shape, d, count, dtype=jnp.float32, seed=1):
    """Random inputs and the expert of each: some popular, some without tokens, and tokens of none."""
    rng = np.random.default_rng(seed)
    ids = np.minimum(rng.geometric(1.5 / (count + 1), shape) - 1, count)
    return jnp.asarray(rng.standard_normal((*shape, d)), dtype), jnp.asarray(ids, jnp.int32)


def close(ours, theirs, dtype=jnp.float32):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if dtype == jnp.float32:
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1, np.abs(theirs).max()), rtol=0)
    else:
        assert np.linalg.norm(ours - theirs) <= 1e-2 * np.linalg.norm(theirs)


def change_backend(monkeypatch, name, **changes):
    """A back end with other attributes, for the length of a test."""
    backends = (dataclasses.replace(b, **changes) if b.name == name else b for b in dispatch.BACKENDS)
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(backends))
