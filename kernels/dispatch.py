"""Which back end computes a sparse FFN on a device, in blocks of which size, and when the dense FFN is faster."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax

from detr_jax.errors import InputError
from detr_jax.kernels import mosaic_gpu, mosaic_tpu, reference, xla
from detr_jax.kernels.backend import Backend, ExpertsShape, FFNShape

BACKENDS = (reference.BACKEND, xla.BACKEND, mosaic_tpu.BACKEND, mosaic_gpu.BACKEND)
IMPLEMENTATIONS = tuple(backend.name for backend in BACKENDS)
"""Names of the back ends."""
LARGEST_UNION = 64
"""Neurons of the largest block into which groups are united for a back end: more groups are hardly ever sparse."""


class UnavailableError(InputError):
    """An implementation that is asked for does not exist or cannot compute an FFN here."""


@dataclass(frozen=True)
class Dispatch:
    """How a sparse FFN is computed on the default device.

    Attributes:
        backend: the back end.
        block_size: neurons per block.
        break_even: density above which the dense FFN is computed instead; None for never.
        refused: the name of each back end that would be preferred on this device, and why it cannot compute this.
    """

    backend: Backend
    block_size: int
    break_even: float | None
    refused: tuple[tuple[str, str], ...] = ()


def choose(shape: FFNShape, implementation: str | None = None, group_size: int | None = None) -> Dispatch:
    """The back end for the default device, or the one that is asked for.

    Args:
        shape: of the FFN.
        implementation: name of a back end; None for the first that can compute it.
        group_size: neurons per group of what is decided, where the size of blocks is free: then it is the smallest
            multiple that a back end takes, and that of `shape` is ignored.

    Raises:
        UnavailableError: if there is none of that name, or it cannot compute this here; it says why.
    """
    candidates = _candidates(implementation)
    sizes = [group_size or shape.block_size]
    if group_size:
        unions = range(2 * group_size, LARGEST_UNION + 1, group_size)
        sizes += [size for size in unions if shape.hidden % size == 0]
    shapes = [dataclasses.replace(shape, block_size=size) for size in sizes]
    refused: list[tuple[str, Any]] = []
    for backend in candidates:
        reasons = [backend.unsupported_reason(shape) for shape in shapes]
        if None in reasons:
            here = shapes[reasons.index(None)]
            density = None if implementation else break_even(backend, jax.devices()[0].device_kind, here)
            return Dispatch(backend, here.block_size, density, tuple(refused))
        refused.append((backend.name, reasons[0]))  # about whole groups
    ((name, reason),) = refused  # without a name, the last candidate computes everything
    raise UnavailableError(f"the implementation {name} cannot compute this: {reason}")


def choose_routed(shape: ExpertsShape, implementation: str | None = None) -> Dispatch:
    """The back end for narrow experts on the default device, or the one that is asked for; raises as `choose`.

    There is no break-even: widths are chosen when experts are fitted, by density or by time.
    """
    refused: list[tuple[str, str]] = []
    for backend in _candidates(implementation):
        reason = backend.routed_unsupported_reason(shape) if backend.run_routed else "it has no narrow experts"
        if reason is None:
            return Dispatch(backend, block_size=1, break_even=None, refused=tuple(refused))
        refused.append((backend.name, reason))
    name, reason = refused[-1]
    raise UnavailableError(f"the implementation {name} cannot compute this: {reason}")


def _candidates(implementation: str | None) -> list[Backend]:
    """The back ends to try, in the order of preference."""
    if implementation is None:
        device = jax.default_backend()
        return [*(backend for backend in BACKENDS if device in backend.platforms), xla.BACKEND]
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise UnavailableError(f"there is no implementation {implementation!r} of the sparse FFN; there are {known}")
    return [BACKENDS[IMPLEMENTATIONS.index(implementation)]]


def break_even(backend: Backend, device_kind: str, shape: FFNShape) -> float:
    """Density above which the dense FFN is faster: measured on this kind of device, or else a guess.

    The measurement counts that is nearest in the type, then in the size of tiles (all tokens of an image may be one),
    the size of blocks, the number of tokens, and the sizes of the FFN. A measurement that lacks one of these is near.
    """

    def apart(entry: dict, key: str) -> float:
        measured, own = entry.get(key), getattr(shape, key)
        known = measured is not None and isinstance(own, int)  # not a symbol of `jax.export`
        return abs(math.log(measured / max(own, 1))) if known else 0.0

    def distance(entry: dict) -> tuple[float, ...]:
        sizes = ("tile_size", "block_size", "tokens", "d_model", "hidden")
        return (entry.get("dtype", shape.dtype.name) != shape.dtype.name, *(apart(entry, size) for size in sizes))

    measured = tuning(tuning_path(device_kind)).get("break_even", {}).get(backend.name)
    return min(measured, key=distance)["density"] if measured else backend.break_even


@cache
def tuning(path: Path) -> dict:
    """Measurements of `scripts/benchmarks/sparse_kernels.py` on a kind of device; empty if nobody ran it there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def tuning_path(device_kind: str) -> Path:
    """The file with the measurements of a kind of device."""
    return Path(__file__).parent / "tuning" / (re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-") + ".json")
