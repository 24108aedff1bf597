"""Checkpoints in the published layouts, in memory."""

import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from golden.recipe import fill

from detr_jax import DetrConfig
from detr_jax.models.registry import abstract_detector

GOLDEN = Path(__file__).parent / "golden"

MANIFESTS = sorted(path.name.removesuffix("_keys.json") for path in GOLDEN.glob("*_keys.json"))


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    """Shape of every entry by name."""
    return {key: tuple(shape) for key, shape in json.loads((GOLDEN / f"{name}_keys.json").read_text()).items()}


def recipe_entries(name: str) -> dict[str, np.ndarray]:
    """The official checkpoint that the golden arrays belong to."""
    return {key: fill(key, shape).astype(np.float32) for key, shape in manifest(name).items()}


def telling_entry(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """By the recipe, under a name of Hugging Face's, scaled so that attention tells tokens and queries apart."""
    entry = fill(name, shape).astype(np.float32)
    if any(part in name for part in ("q_proj", "k_proj", "query_position")):
        return 3 * entry
    return 0.3 * entry if "layer.2.convolution" in name else entry  # as the recipe does with conv3, its other name


def empty_entries(name: str) -> dict[str, np.ndarray]:
    """Zeros that take no memory."""
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in manifest(name).items()}


def small_entries(name: str) -> dict[str, np.ndarray]:
    """Zeros of the same layout with a sixteenth of the channels and neurons."""
    shapes = {key: tuple(size // 16 if size % 64 == 0 else size for size in of) for key, of in manifest(name).items()}
    return {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}


@functools.cache
def parameter_shapes(config: DetrConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each of a detector's parameters by name."""
    state = nnx.state(abstract_detector(config, jnp.float32))
    return {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(state)}
