"""Parts that the kernels for Hopper GPUs share.

No kernel sets a warpgroup aside for copying. Three warpgroups get 168 registers a thread, too few for the sums of 64
tokens and 256 features beside the activations of a chunk. `set_max_registers` shares registers out, and ptxas obeys it,
with which JAX 0.10.2 compiles. JAX 0.12.0.1 compiles with nvJitLink, which ignores it (versions 12.9 and 13.5, C7504):
registers are spilled, and products wait for each other (C7512).
"""

from typing import Any

import jax
import jax.numpy as jnp

MAX_FEATURES = 256
"""Model features whose sums for 64 tokens fit the registers of a warpgroup."""

LAYOUT_ROWS = 8
"""Rows of a tile of the layout of operands in shared memory."""


def unsupported_device() -> str | None:
    """Why the default device cannot run these kernels; None if it can."""
    if jax.default_backend() != "gpu":
        return f"it runs on Hopper GPUs, not on {jax.default_backend()}"
    capability = getattr(jax.devices()[0], "compute_capability", "unknown")
    if capability != "9.0":
        return f"it runs on Hopper GPUs, of compute capability 9.0, not {capability}"
    return None


def unsupported_inputs(dtype: jnp.dtype, d_model: int) -> str | None:
    """Why these kernels cannot take inputs of a type and a number of features; None if they can."""
    if dtype != jnp.bfloat16:
        return f"it computes in bfloat16, not in {dtype}"
    if d_model % 64:
        return f"{d_model} features are not a multiple of 64"
    if d_model > MAX_FEATURES:
        return f"sums of {d_model} features do not fit its registers, up to {MAX_FEATURES} do"
    return None


def swizzle() -> tuple[Any, ...]:
    """The layout of the matrix unit's operands in shared memory: tiles of 8 rows of 128 bytes, which is 64 bfloat16."""
    from jax.experimental.pallas import mosaic_gpu as plgpu  # half a second: not where it does not run

    return plgpu.TilingTransform((LAYOUT_ROWS, 64)), plgpu.SwizzleTransform(128)


def transposed(ref: Any) -> Any:
    """A matrix in shared memory seen as its transpose: a method since JAX 0.11, a function before."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def along_rows(row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The same numbers for every row of an accumulator, in float32."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    row = plgpu.layout_cast(row, plgpu.Layout.WGMMA.reduce(0)).astype(jnp.float32)
    return jax.lax.broadcast_in_dim(row, shape, [1])


def along_columns(column: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The same numbers for every column of an accumulator."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return jax.lax.broadcast_in_dim(plgpu.layout_cast(column, plgpu.Layout.WGMMA.reduce(1)), shape, [0])
