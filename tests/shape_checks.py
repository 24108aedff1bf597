"""A type checker for the import hook of jaxtyping: shapes of arrays of JAX and numpy; types are left to mypy."""

import inspect
import types
from collections.abc import Callable
from functools import reduce
from operator import or_

import jax
import numpy as np
from beartype import beartype
from jaxtyping import AbstractArray

ANY_ARRAY = jax.Array | np.ndarray | np.generic


def shape_of(annotation: object) -> object:
    """The annotation for arrays of either library; None where it says nothing of a shape."""
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return annotation.dtype[ANY_ARRAY, annotation.dim_str]
    if isinstance(annotation, types.UnionType):
        shapes = [shape_of(part) or part for part in annotation.__args__]
        return reduce(or_, shapes) if any(map(shape_of, annotation.__args__)) else None
    return None


def check_shapes(function: Callable) -> Callable:
    annotations = inspect.get_annotations(function)
    shapes = {name: shape for name, hint in annotations.items() if (shape := shape_of(hint)) is not None}
    if not shapes:
        return function
    function.__annotations__ = shapes
    try:
        return beartype(function)
    finally:
        function.__annotations__ = annotations
