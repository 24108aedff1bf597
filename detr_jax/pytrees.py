"""Frozen dataclasses as JAX pytrees: those whose class counts, and those that add up."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Self, TypeVar, cast, dataclass_transform

import jax
import numpy as np

Array = jax.Array | np.ndarray
Class = TypeVar("Class", bound=type)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def frozen(cls: Class) -> Class:
    """Makes a class a frozen dataclass, unless it is a dataclass already."""
    return cls if "__dataclass_fields__" in vars(cls) else cast(Class, dataclasses.dataclass(frozen=True)(cls))


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def pytree(cls: Class) -> Class:
    """Makes a class a frozen dataclass and a pytree; fields with the metadata `static=True` are part of the structure.

    As `jax.tree_util.register_dataclass`, but two classes with the same fields are different structures. There they
    compare equal (seen in jax 0.10.2 and 0.12.0), and `jax.jit`, which looks programs up by structure, now and then
    runs the program of one selector for another, when two hashes collide.
    """
    cls = frozen(cls)
    static = [field.name for field in dataclasses.fields(cls) if field.metadata.get("static")]
    children = [field.name for field in dataclasses.fields(cls) if field.name not in static]

    def flatten_with_keys(instance: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        keys = tuple((jax.tree_util.GetAttrKey(name), getattr(instance, name)) for name in children)
        return keys, tuple(getattr(instance, name) for name in static)

    def flatten(instance: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(instance, name) for name in children), tuple(getattr(instance, name) for name in static)

    def unflatten(values: tuple[Any, ...], leaves: Iterable[Any]) -> Any:
        return cls(**dict(zip(static, values, strict=True)), **dict(zip(children, leaves, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


class Sums:
    """Base of pytrees of counts and sums, of one batch in JAX's types; `+` adds two on the host, in 64 bits."""

    def __add__(self, other: Self) -> Self:
        return jax.tree.map(lambda a, b: _wide(a) + _wide(b), self, other)


def _wide(array: Array) -> np.ndarray:
    array = np.asarray(array)
    return array.astype(np.int64 if np.issubdtype(array.dtype, np.integer) else np.float64)
