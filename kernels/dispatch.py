"""Which implementation computes a sparse FFN, and when it is worth it on a device."""

import importlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp

from detr_jax.errors import InputError
from detr_jax.kernels import reference
from detr_jax.kernels.block_masks import BlockLists, indices_to_mask
from detr_jax.kernels.reference import FFNWeights

IMPLEMENTATIONS = ("reference", "xla", "mosaic_tpu", "mosaic_gpu")
PREFERRED = {"cpu": ("xla",), "gpu": ("mosaic_gpu", "xla"), "tpu": ("mosaic_tpu", "xla")}
"""What is tried on a kind of device, in this order."""
BREAK_EVEN = {"xla": 0.75, "mosaic_tpu": 0.7, "mosaic_gpu": 0.6}
"""Density of tiles and blocks above which the dense FFN is taken on devices that nobody has tuned."""

Run = Callable[[jax.Array, FFNWeights, BlockLists, jax.Array | None], jax.Array]
"""x (tiles, tile tokens, d), weights, lists with B entries a row, active (tiles, tile tokens, G) or None -> like x."""


@dataclass(frozen=True)
class FFNShape:
    """What an implementation has to know to say whether it can compute something.

    Attributes:
        dtype: of the inputs and weights.
        tile_size: tokens per tile.
        d_model: d.
        features: F.
        blocks: B.
        groups: G of the exact mode, else None.
        tokens: of all images together.
    """

    dtype: jnp.dtype
    tile_size: int
    d_model: int
    features: int
    blocks: int
    groups: int | None
    tokens: int


@dataclass(frozen=True)
class Choice:
    """An implementation, and the density above which the dense FFN is computed instead; None for never."""

    name: str
    run: Run
    break_even: float | None


class UnavailableError(InputError):
    """An implementation that is asked for does not exist or cannot compute something here."""


def choose(ffn_shape: FFNShape, name: str | None = None) -> Choice:
    """The implementation for the default device, or the one that is asked for.

    Raises:
        UnavailableError: if there is none of that name, or it cannot compute this here; it says why.
    """
    if name is not None:
        if name not in IMPLEMENTATIONS:
            raise UnavailableError(
                f"there is no implementation {name!r} of the sparse FFN; there are {', '.join(IMPLEMENTATIONS)}"
            )
        if reason := unsupported_reason(ffn_shape, name):
            raise UnavailableError(f"the implementation {name} cannot compute this: {reason}")
        return Choice(name, _run_of(name), None)
    name = next(n for n in PREFERRED.get(jax.default_backend(), ("xla",)) if not unsupported_reason(ffn_shape, n))
    return Choice(name, _run_of(name), break_even(name, jax.devices()[0].device_kind, ffn_shape))


def unsupported_reason(ffn_shape: FFNShape, name: str) -> str | None:
    """Why an implementation cannot compute something on the default device; None if it can."""
    if name in ("reference", "xla"):
        return None
    return importlib.import_module(f"detr_jax.kernels.{name}").unsupported_reason(ffn_shape)


def break_even(name: str, device_kind: str, ffn_shape: FFNShape) -> float:
    """Density above which the dense FFN is faster: measured on this kind of device, or else a guess.

    Of what was measured that counts which is nearest in the size of tiles, where all tokens of an image may be a tile,
    and then in the number of tokens.
    """

    def distance(entry: dict) -> tuple[float, float]:
        return tuple(abs(math.log(entry[key] / max(getattr(ffn_shape, key), 1))) for key in ("tile_size", "tokens"))

    measured = tuning(device_kind).get("break_even", {}).get(name)
    return min(measured, key=distance)["density"] if measured else BREAK_EVEN[name]


@cache
def tuning(device_kind: str) -> dict:
    """What `scripts/benchmarks/sparse_kernels.py` measured on a kind of device; empty if nobody ran it there."""
    path = tuning_path(device_kind)
    return json.loads(path.read_text()) if path.is_file() else {}


def tuning_path(device_kind: str) -> Path:
    """The file with the figures of a kind of device."""
    return Path(__file__).parent / "tuning" / (re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-") + ".json")


def _run_of(name: str) -> Run:
    if name == "reference":
        return _reference
    return importlib.import_module(f"detr_jax.kernels.{name}").block_sparse_ffn


def _reference(x: jax.Array, weights: FFNWeights, lists: BlockLists, active: jax.Array | None) -> jax.Array:
    tiles, tile_size, d = x.shape
    needed = indices_to_mask(lists, lists.indices.shape[-1])
    one_image = None if active is None else active.reshape(tiles * tile_size, -1)
    flat = reference.block_sparse_ffn(x.reshape(-1, d), weights, needed, tile_size, one_image)
    return flat.reshape(x.shape)
