"""Narrow experts over all implementations: every token goes through the one expert that it is assigned to."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from detr_jax.kernels import experts as reference
from detr_jax.kernels.backend import ExpertsShape
from detr_jax.kernels.dispatch import Dispatch, choose_routed
from detr_jax.kernels.experts import Experts
from detr_jax.kernels.transforms import batched, on_each_shard


def routed_ffn(
    x: Float[Array, "*batch tokens d"],
    experts: Experts,
    assignment: Int[Array, "*batch tokens"],
    *,
    implementation: str | None = None,
) -> Float[Array, "*batch tokens d"]:
    """The FFN of which every token computes one narrow expert.

    Same values as `experts.routed_ffn`, whose derivatives by `x` and the experts it has too. Tokens of all leading axes
    are grouped together. Maps over a batch with `jax.vmap`, and runs inside `jax.shard_map` over tokens or images.

    Args:
        x: float32 or bfloat16.
        experts: of the same type.
        assignment: the expert of each token; the number of experts or more for none, which gives 0.
        implementation: name of one; None for the fastest on the device.

    Raises:
        ValueError: if shapes or types do not fit, or the implementation cannot compute this; it says why.
    """
    _check(x, experts, assignment)
    if 0 in x.shape:
        return jnp.zeros_like(x)
    run = dispatch_routed(x, experts.widths, implementation).backend.run_routed

    def flattened(x, experts, assignment):
        return _differentiable(run, x.reshape(-1, x.shape[-1]), experts, assignment.reshape(-1)).reshape(x.shape)

    return on_each_shard(flattened, x, experts, assignment)


def dispatch_routed(
    x: jax.Array | jax.ShapeDtypeStruct, widths: tuple[int, ...], implementation: str | None = None
) -> Dispatch:
    """How `routed_ffn` computes x (..., d) on the default device, with experts of these widths; raises as `choose`."""
    return choose_routed(ExpertsShape(x.dtype, math.prod(x.shape[:-1]), x.shape[-1], widths), implementation)


def _check(x, experts, assignment):
    d, count = x.shape[-1], len(experts.widths)
    stacks = [tuple(stack.shape for stack in stacks) for stacks in zip(*experts[:3], strict=True)]
    fitting = all(w_in == w_out == (*b_in, d) and len(b_in) == 2 for w_in, b_in, w_out in stacks)
    if not fitting or experts.b_out.shape != (count, d) or not count:
        raise ValueError(
            f"experts of shapes {stacks} and {experts.b_out.shape} do not fit inputs of {d} features: stacks "
            f"(n, k, {d}), (n, k), (n, k, {d}) and ({max(count, 1)}, {d}) would"
        )
    if types := {array.dtype.name for array in jax.tree.leaves(experts)} - {x.dtype.name}:
        raise ValueError(f"experts of {', '.join(sorted(types))} do not fit inputs of {x.dtype.name}")
    if assignment.shape != x.shape[:-1] or not jnp.issubdtype(assignment.dtype, jnp.integer):
        raise ValueError(
            f"inputs {x.shape} need the integer expert of each token, {x.shape[:-1]}, not {assignment.dtype} "
            f"{assignment.shape}"
        )


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(run, x, experts, assignment):
    return batched(run)(x, experts, assignment)


@_differentiable.defjvp
def _tangents(run, primals, tangents):
    """Derivatives are the definition's, forward and backward; backward, hidden activations are computed again."""
    x, experts, assignment = primals
    definition = jax.checkpoint(lambda x, experts: reference.routed_ffn(x, experts, assignment))
    return _differentiable(run, *primals), jax.jvp(definition, (x, experts), tangents[:2])[1]
