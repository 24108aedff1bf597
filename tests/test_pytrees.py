"""Dataclasses as pytrees whose class counts."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detr_jax.pytrees import pytree


def make():
    @pytree
    @dataclass(frozen=True)
    class Pair:
        size: int = field(metadata={"static": True})
        first: jax.Array
        second: jax.Array

    return Pair


def test_what_is_static_is_structure_and_the_rest_are_children():
    pair = make()(3, jnp.zeros(2), jnp.ones(1))
    leaves, structure = jax.tree.flatten(pair)
    assert [leaf.shape for leaf in leaves] == [(2,), (1,)]
    again = jax.tree.unflatten(structure, leaves)
    assert (again.size, again.second) == (3, 1) and type(again) is type(pair)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(pair)]
    assert paths == [".first", ".second"]
    assert structure != jax.tree.structure(type(pair)(4, *leaves))
    doubled = jax.jit(lambda p: jax.tree.map(lambda a: 2 * a, p))(pair)
    np.testing.assert_array_equal(doubled.second, [2])


def test_two_classes_with_the_same_fields_are_two_structures():
    one, other = (jax.tree.structure(make()(3, 1.0, 2.0)) for _ in range(2))
    assert one != other and {one: 1}.get(other) is None


@pytest.mark.parametrize("wrapped", [lambda p: p, lambda p: {"a": (p,)}])
def test_a_jitted_function_tells_them_apart(wrapped):
    classes = [make() for _ in range(50)]

    @jax.jit
    def which(argument):
        (pair,) = jax.tree.leaves(argument, is_leaf=lambda node: isinstance(node, tuple(classes)))
        return classes.index(type(pair)) + pair.first

    for i, cls in enumerate(classes):
        assert which(wrapped(cls(3, 0, 0))) == i
