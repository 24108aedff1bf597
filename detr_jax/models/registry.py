"""The architectures that files can hold, by the name that their headers give."""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from detr_jax.models.base import Detector

ARCHITECTURES: dict[str, tuple[type, Callable[..., Detector]]] = {}
"""The dataclass of the configuration and the module of each."""


def register(name: str, config: type, module: Callable[..., Detector]) -> None:
    """Makes an architecture known to `detr_jax.load` and `detr_jax.save`.

    Args:
        name: in the files' headers.
        config: a frozen dataclass of JSON types, tuples and such dataclasses; a classmethod `from_json` reads what
            earlier versions wrote.
        module: is made as `module(config, dtype=..., rngs=...)`.
    """
    ARCHITECTURES[name] = config, module


def architecture_of(config: Any) -> str:
    """Name of the architecture that a configuration describes."""
    return next(name for name, (described, _) in ARCHITECTURES.items() if described is type(config))


def build_detector(config: Any, dtype: jnp.dtype = jnp.float32, *, rngs: nnx.Rngs) -> Detector:
    """The detector that a configuration describes, with random parameters."""
    _, module = ARCHITECTURES[architecture_of(config)]
    return module(config, dtype=dtype, rngs=rngs)


class _OneKey(nnx.RngStream):
    """The same key at every call: counting them, as flax does it, takes seconds to trace."""

    def __call__(self) -> jax.Array:
        return self.key[...]


def abstract_detector(config: Any, dtype: jnp.dtype) -> Detector:
    """The detector that a configuration describes, with shapes in the place of its parameters."""

    def make() -> Detector:
        rngs = nnx.Rngs(0)
        rngs.default = _OneKey(0, tag="default")  # type: ignore[attr-defined]
        return build_detector(config, dtype, rngs=rngs)

    return nnx.eval_shape(make)


def config_from_json(architecture: str, values: dict[str, Any]) -> Any:
    """Inverse of `dataclasses.asdict`, through JSON: a KeyError for an unknown architecture, a TypeError for fields."""
    config, _ = ARCHITECTURES[architecture]
    return config.from_json(values) if hasattr(config, "from_json") else dataclass_from_json(config, values)


def dataclass_from_json(cls: type, values: dict[str, Any]) -> Any:
    """A dataclass from JSON types: lists become tuples, objects the dataclasses of their fields."""
    types = typing.get_type_hints(cls)

    def field(name: str, value: Any) -> Any:
        if isinstance(value, dict) and dataclasses.is_dataclass(types.get(name)):
            return dataclass_from_json(types[name], value)
        return tuple(value) if isinstance(value, list) else value

    return cls(**{name: field(name, value) for name, value in values.items()})
