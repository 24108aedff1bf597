"""Narrow experts: every implementation against the definition, and against a loop over tokens."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from commands import cpu_devices
from kernel_cases import random_experts, random_routed_inputs

from detr_jax.kernels import UnavailableError, routed_ffn
from detr_jax.kernels.experts import group_tokens
from detr_jax.kernels.routed_xla import tile_sizes

D = 12
HERE = ["reference", "xla"]
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}
CASES = {
    "several stacks": ((2, 8), (3, 5), (1, 16)),
    "one expert": ((1, 9),),
    "an affine map among them": ((1, 0), (2, 7)),
    "affine maps alone": ((4, 0),),
    "more experts than tokens": ((70, 3), (60, 4)),
}
"""Stacks as (experts, neurons)."""


def experts_of(stacks, dtype=jnp.float32, seed=0):
    return random_experts(stacks, D, dtype, seed)


def inputs_of(shape=(3, 37), count=6, dtype=jnp.float32, seed=1):
    return random_routed_inputs(shape, D, count, dtype, seed)


def token_by_token(x, experts, assignment):
    flat = [np.asarray(stack[i], np.float64) for stack in experts.w_in for i in range(len(stack))]
    biases = [np.asarray(stack[i], np.float64) for stack in experts.b_in for i in range(len(stack))]
    rows = [np.asarray(stack[i], np.float64) for stack in experts.w_out for i in range(len(stack))]
    outputs = np.zeros(x.shape)
    for place in np.ndindex(assignment.shape):
        if (c := int(assignment[place])) < len(flat):
            hidden = np.maximum(flat[c] @ np.asarray(x[place], np.float64) + biases[c], 0)
            outputs[place] = hidden @ rows[c] + np.asarray(experts.b_out[c], np.float64)
    return outputs


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_every_token_gets_its_expert(implementation, dtype, case):
    experts = experts_of(CASES[case], dtype)
    x, assignment = inputs_of(count=len(experts.b_out), dtype=dtype)
    found = jax.jit(routed_ffn, static_argnames="implementation")(x, experts, assignment, implementation=implementation)
    assert found.dtype == x.dtype
    expected = token_by_token(x, experts, assignment)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=TOLERANCE[dtype] * np.abs(expected).max())


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("ids", [[0] * 50, [5] * 50, [6] * 50, [0] * 49 + [5], list(range(6)) * 8 + [6, 6]])
def test_all_tokens_in_one_expert_none_in_any_or_padding_alone(implementation, ids):
    experts = experts_of(CASES["several stacks"])
    x, assignment = inputs_of((50,))[0], jnp.array(ids)
    found = routed_ffn(x, experts, assignment, implementation=implementation)
    np.testing.assert_allclose(found, token_by_token(x, experts, assignment), atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 144, 300, 2000])
def test_every_tile_size_and_rest(tokens):
    experts = experts_of(CASES["several stacks"])
    x, assignment = inputs_of((tokens,))
    found = routed_ffn(x, experts, assignment, implementation="xla")
    np.testing.assert_allclose(found, token_by_token(x, experts, assignment), atol=1e-5)


def test_tiles_are_smaller_the_fewer_tokens_an_expert_has():
    sizes = [tile_sizes(tokens, 16) for tokens in (1, 1050, 4200, 22223)]
    assert all(of == tuple(sorted(of, reverse=True)) for of in sizes)
    assert [of[0] for of in sizes] == sorted(of[0] for of in sizes)


def test_tokens_of_others_leave_no_trace():
    """Also not through NaN: rows of neighbours share tiles."""
    experts = experts_of(CASES["several stacks"])
    x, assignment = inputs_of((200,))
    poisoned = jnp.where((assignment == 2)[:, None], jnp.nan, x)
    found = np.asarray(routed_ffn(poisoned, experts, assignment, implementation="xla"))
    clean = np.asarray(routed_ffn(x, experts, assignment, implementation="xla"))
    other = np.asarray(assignment != 2)
    np.testing.assert_array_equal(found[other], clean[other])
    assert np.isnan(found[~other]).all()


@pytest.mark.parametrize("implementation", [*HERE, None])
def test_gradients_are_those_of_the_definition(implementation):
    experts = experts_of(CASES["several stacks"])
    x, assignment = inputs_of()

    def loss(run, x, experts):
        return (jnp.sin(run(x, experts, assignment)) ** 2).sum()

    def gradients(implementation):
        run = lambda *arguments: routed_ffn(*arguments, implementation=implementation)  # noqa: E731
        return jax.grad(loss, argnums=(1, 2))(run, x, experts)

    for one, other in zip(*map(jax.tree.leaves, (gradients(implementation), gradients("reference"))), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("implementation", HERE)
def test_vmap_is_a_batch(implementation):
    experts = experts_of(CASES["several stacks"])
    x, assignment = inputs_of()
    run = lambda *arguments: routed_ffn(*arguments, implementation=implementation)  # noqa: E731
    expected = token_by_token(x, experts, assignment)
    np.testing.assert_allclose(jax.vmap(run, (0, None, 0))(x, experts, assignment), expected, atol=1e-5)
    one_assignment = jax.vmap(run, (0, None, None))(x, experts, assignment[0])
    repeated = jnp.broadcast_to(assignment[0], assignment.shape)
    np.testing.assert_allclose(one_assignment, token_by_token(x, experts, repeated), atol=1e-5)
    others = [experts_of(CASES["several stacks"], seed=seed) for seed in range(3)]
    each = jax.vmap(run)(x, jax.tree.map(lambda *of: jnp.stack(of), *others), assignment)
    for i, of in enumerate(others):
        np.testing.assert_allclose(each[i], token_by_token(x[i], of, assignment[i]), atol=1e-5)


def test_a_batch_is_grouped_as_one():
    experts = experts_of(CASES["several stacks"])
    x, assignment = inputs_of()
    run = jax.vmap(lambda *arguments: routed_ffn(*arguments, implementation="xla"), (0, None, 0))
    assert str(jax.make_jaxpr(run)(x, experts, assignment)).count(" sort[") == 1


def test_nothing_recompiles_with_the_data():
    experts = experts_of(CASES["several stacks"])
    run = jax.jit(partial(routed_ffn, implementation="xla"))
    for seed in range(3):
        x, assignment = inputs_of(seed=seed)
        run(x, experts, assignment)
    assert run._cache_size() == 1


def test_the_number_of_tokens_may_be_a_symbol():
    experts = experts_of(CASES["several stacks"])
    (images,) = jax.export.symbolic_shape("images")
    shapes = jax.ShapeDtypeStruct((images, 37, D), jnp.float32), jax.ShapeDtypeStruct((images, 37), jnp.int32)
    exported = jax.export.export(jax.jit(lambda x, a: routed_ffn(x, experts, a, implementation="xla")))(*shapes)
    for images in (1, 3):
        x, assignment = inputs_of((images, 37))
        np.testing.assert_allclose(exported.call(x, assignment), token_by_token(x, experts, assignment), atol=1e-5)


def test_tokens_are_grouped_in_their_own_order():
    ids = np.random.default_rng(0).integers(0, 70, 500)  # from 64 on of no expert
    groups = group_tokens(jnp.asarray(ids), 64)
    expected = np.argsort(np.minimum(ids, 64), kind="stable")
    np.testing.assert_array_equal(groups.order, expected)
    np.testing.assert_array_equal(groups.ends, np.searchsorted(np.minimum(ids, 64)[expected], range(64), side="right"))


def test_bad_arguments_are_named(unchecked_shapes):
    experts = experts_of(CASES["several stacks"])
    x, assignment = inputs_of()
    with pytest.raises(ValueError, match=r"need the integer expert of each token, \(3, 37\)"):
        routed_ffn(x, experts, assignment[:, 1:])
    with pytest.raises(ValueError, match=r"need the integer expert of each token, \(3, 37\), not float32"):
        routed_ffn(x, experts, assignment.astype(jnp.float32))
    with pytest.raises(ValueError, match="do not fit inputs of 11 features"):
        routed_ffn(x[..., 1:], experts, assignment)
    with pytest.raises(ValueError, match="experts of bfloat16 do not fit inputs of float32"):
        routed_ffn(x, experts_of(CASES["several stacks"], jnp.bfloat16), assignment)
    with pytest.raises(ValueError, match=r"and \(6, 12\) would"):
        routed_ffn(x, experts._replace(b_out=experts.b_out[1:]), assignment)
    with pytest.raises(UnavailableError, match="there is no implementation 'none'"):
        routed_ffn(x, experts, assignment, implementation="none")
    assert routed_ffn(x[:0], experts, assignment[:0]).shape == (0, 37, D)


def test_runs_over_a_mesh_of_devices():
    """Eight devices share the images of a batch, by shard_map and by explicit axes."""
    program = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from test_routed import CASES, experts_of, inputs_of, token_by_token
from detr_jax.kernels import routed_ffn
experts = experts_of(CASES["several stacks"])
x, assignment = inputs_of((16, 37))
expected = token_by_token(x, experts, assignment)
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((8,), ("images",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        operands = jax.device_put((x, assignment), NamedSharding(mesh, P("images")))
        found = jax.jit(lambda x, a: routed_ffn(x, experts, a))(*operands)
        np.testing.assert_allclose(found, expected, atol=1e-5)
mesh = jax.make_mesh((8,), ("images",), axis_types=(AxisType.Auto,))
shared = jax.shard_map(lambda x, a: routed_ffn(x, experts, a), mesh=mesh, in_specs=P("images"), out_specs=P("images"))
np.testing.assert_allclose(jax.jit(shared)(x, assignment), expected, atol=1e-5)
"""
    environment = os.environ | cpu_devices(8)
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
