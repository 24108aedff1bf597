"""Random FFNs with maps of what their tiles need, their definition, and when two outputs count as equal."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.kernels import FFNWeights, dispatch, reference

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
