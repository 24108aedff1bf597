"""What Pallas kernels for TPUs share."""

import jax

LANES = 128
"""Columns of a register."""
SMALLEST_MEMORY = 16 << 20
"""Bytes of vector memory of the smallest supported TPU."""


def absent() -> str | None:
    """Why kernels for TPUs cannot run on the default device; None if they can."""
    here = jax.default_backend()
    return None if here == "tpu" else f"it runs on TPUs, not on {here}"


def vector_memory() -> int:
    """Bytes of vector memory of the default device, or of the smallest TPU if it is none."""
    from jax.experimental.pallas import tpu as pltpu  # 0.2 seconds: not where it does not run

    return pltpu.get_tpu_info().vmem_capacity_bytes if jax.default_backend() == "tpu" else SMALLEST_MEMORY
