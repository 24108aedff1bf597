"""What computes an FFN in a benchmark of its implementations, and whether that is right."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from random_gates import RandomGate, random_inputs

from detr_jax.kernels import FFNWeights, block_sparse_ffn, mosaic_gpu
from detr_jax.kernels.reference import block_sparse_ffn as definition

TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}
"""Norm of the difference to the definition over the norm of the outputs."""
FUSED = "fused dense"
"""The Hopper kernel without lists."""


def random_weights(d_model: int, features: int, dtype: str) -> FFNWeights:
    """An FFN whose outputs are about as large as its inputs."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((features, d_model), (features,), (features, d_model), (d_model,))
    scales = (d_model**-0.5, 0.1, features**-0.5, 0.1)
    arrays = [scale * jax.random.normal(k, shape) for k, shape, scale in zip(keys, shapes, scales, strict=True)]
    return FFNWeights(*(array.astype(dtype) for array in arrays))


def fused_dense(x: jax.Array, weights: FFNWeights) -> jax.Array:
    """The dense FFN by the Hopper kernel: (tokens, d) -> (tokens, d)."""
    return mosaic_gpu.block_sparse_ffn(x[None], weights, None)[0]


def sparse_ffn(gate: RandomGate, implementation: str | None) -> Callable[..., jax.Array]:
    """A gate and the FFN that it makes sparse: (x, weights, kernel, threshold) -> outputs."""

    def run(x, weights, kernel, threshold):
        needed, order = gate.decide(x, kernel, threshold)
        ordered = x if order is None else x[order]
        outputs = block_sparse_ffn(ordered, weights, needed, gate.tile_size, implementation=implementation)
        return outputs if order is None else outputs[jnp.argsort(order)]

    return run


def defined_ffn(gate: RandomGate) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The same by the definition, in float32; and what tiles need."""

    def run(x, weights, kernel, threshold):
        needed, order = gate.decide(x, kernel, threshold)
        ordered = x if order is None else x[order]
        outputs = precise_ffn(ordered, weights, needed, gate.tile_size)
        return outputs if order is None else outputs[jnp.argsort(order)], needed

    return run


def precise_ffn(x: jax.Array, weights: FFNWeights, needed: jax.Array, tile_size: int) -> jax.Array:
    """The definition in float32, whatever the inputs' type."""
    with jax.default_matmul_precision("highest"):
        return definition(*jax.tree.map(lambda array: array.astype(jnp.float32), (x, weights)), needed, tile_size)


def error_of(name: str, ours: jax.Array, theirs: jax.Array, where: str) -> float:
    """Norm of the difference over the norm of the outputs.

    Raises:
        AssertionError: if it is not within the tolerance of ours' type.
    """
    error = float(jnp.linalg.norm(ours.astype(jnp.float32) - theirs) / jnp.linalg.norm(theirs))
    if not error <= TOLERANCES[ours.dtype.name]:
        raise AssertionError(f"{name} is wrong by {error:.2e} {where}")
    return error


def check(names: Sequence[str], weights: FFNWeights, blocks: int, tile_sizes: Sequence[int]) -> dict[str, float]:
    """The largest error of each implementation on maps of all kinds; the last tile is not full.

    Raises:
        AssertionError: if one is not within the tolerance.
    """
    rng = np.random.default_rng(0)
    worst = dict.fromkeys(names, 0.0)
    for tile_size in tile_sizes:
        x = random_inputs(3 * tile_size + 1, weights.w_in.shape[1], 0.0).astype(weights.w_in.dtype)
        define = jax.jit(partial(precise_ffn, tile_size=tile_size))
        programs = {
            name: jax.jit(partial(block_sparse_ffn, tile_size=tile_size, implementation=name))
            for name in names
            if name != FUSED
        }
        for share in (0.0, 0.1, 0.5, 1.0):
            needed = jnp.asarray(rng.random((4, blocks)) < share)
            theirs = define(x, weights, needed)
            outputs = {name: run(x, weights, needed) for name, run in programs.items()}
            if FUSED in names and share == 1:
                outputs[FUSED] = jax.jit(fused_dense)(x, weights)
            where = f"where tiles of {tile_size} of {len(x)} tokens need {share} of the blocks"
            for name, ours in outputs.items():
                worst[name] = max(worst[name], error_of(name, ours, theirs, where))
    return worst
