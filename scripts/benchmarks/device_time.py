"""Times that calls take on a device, and the most that the device can do in them."""

import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from detr_jax.search.timing import interleaved_times

ROUNDS = 3
"""Times that contestants take turns under the profiler, which runs each several times in a row."""

Contestants = dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]
"""Jitted function and operands by name."""


@dataclass(frozen=True)
class Times:
    """Seconds of contestants that took turns.

    Attributes:
        clock: "device" for the sum of what their kernels took, without the gaps between them; "host" for the time from
            the call until its result is there, launches included.
        seconds: of each call, by that clock.
        host: of each call, by the host's clock.
    """

    clock: str
    seconds: dict[str, list[float]]
    host: dict[str, list[float]]


@dataclass(frozen=True)
class Ceilings:
    """What was measured on a device, and nothing can exceed.

    Attributes:
        flops_per_second: of a large matrix product.
        bytes_per_second: read and written by a large elementwise operation.
        clock: as of `Times`.
    """

    flops_per_second: float
    bytes_per_second: float
    clock: str


def times(baselines: Contestants, repeats: int) -> Times:
    """Times contestants: on NVIDIA GPUs by CUPTI's records of their kernels, elsewhere by the host's clock.

    CUPTI does not see kernels in branches of a CUDA graph: what contains a `jax.lax.switch` is for the host's clock.
    Where CUPTI cannot be used, a warning says why and the host's clock is taken.
    """
    calls = {name: lambda run=run, of=of: jax.block_until_ready(run(*of)) for name, (run, of) in baselines.items()}
    host = interleaved_times(calls, repeats)
    if jax.default_backend() == "gpu":
        try:
            return Times("device", _profiled(baselines, repeats), host)
        except (ImportError, RuntimeError) as error:
            warnings.warn(f"times are the host's: CUPTI reports {error}", stacklevel=2)
    return Times("host", host, host)


def _profiled(baselines: Contestants, repeats: int) -> dict[str, list[float]]:
    from jax.experimental.mosaic.gpu import profiler

    together = max(math.ceil(repeats / ROUNDS), 2)  # of one it returns a number, of several a list
    seconds: dict[str, list[float]] = {name: [] for name in baselines}
    for _ in range(ROUNDS):
        for name, (run, operands) in baselines.items():
            _, milliseconds = profiler.measure(run, iterations=together)(*operands)
            if milliseconds is None:
                raise RuntimeError(f"no kernel of {name}")
            seconds[name] += [value / 1e3 for value in milliseconds]
    return seconds


def peaks(dtype: str, side: int, copied_bytes: int, repeats: int) -> Ceilings:
    """Measures the device.

    Args:
        dtype: of the product.
        side: of the square matrices that are multiplied.
        copied_bytes: of the array that is read and written.
        repeats: turns.
    """
    square = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype)
    long = jnp.ones(copied_bytes // 4, jnp.float32)
    # Negated, because a plain copy is no kernel on a GPU.
    measured = times(
        {"product": (jax.jit(jnp.matmul), (square, square)), "copy": (jax.jit(jnp.negative), (long,))}, repeats
    )
    medians = {name: statistics.median(seconds) for name, seconds in measured.seconds.items()}
    return Ceilings(2 * side**3 / medians["product"], 2 * long.nbytes / medians["copy"], measured.clock)
