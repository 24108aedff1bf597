"""Rules for batching and sharding that the operations share."""

import jax
import jax.numpy as jnp


def on_each_shard(run, x, weights, *others):
    """Runs on the images of each device, where the axes of the mesh are explicit; those of tokens are gathered.

    Loops and branches over tiles cannot be partitioned by the types of their operands.
    """
    mesh = jax.typeof(x).sharding.mesh
    if not mesh.explicit_axes:
        return run(x, weights, *others)
    images = jax.sharding.PartitionSpec(*jax.typeof(x).sharding.spec[:-2])
    specs = (images, jax.sharding.PartitionSpec(), *(None if array is None else images for array in others))
    operands = jax.sharding.reshard((x, weights, *others), specs)
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=images))(*operands)


def batched(run):
    """The computation with a rule for `jax.vmap`, which would turn a switch into all of its branches.

    `run` takes x, weights and arrays that have the leading axis of x, or None; more of that axis cost nothing more.
    """

    @jax.custom_batching.custom_vmap
    def compute(*arrays):
        return run(*varying_alike(*arrays))

    @compute.def_vmap
    def map_over(size, mapped, x, weights, *others):
        def stacked(array, is_mapped):
            return array if is_mapped else jnp.broadcast_to(array, (size, *array.shape))

        tokens = jax.tree.map(stacked, (x, *others), (mapped[0], *mapped[2:]))
        if any(jax.tree.leaves(mapped[1])):  # other weights for each
            weights = jax.tree.map(stacked, weights, mapped[1])
            return jax.lax.map(lambda one: compute(one[0][0], one[1], *one[0][1:]), (tokens, weights)), True
        x, *others = jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), tokens)
        outputs = compute(x, weights, *others)
        return outputs.reshape(size, -1, *outputs.shape[1:]), True

    return compute


def varying_alike(*arrays):
    """Arrays that vary over the same axes inside `jax.shard_map`, as all branches and the state of loops must."""
    axes = frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in jax.tree.leaves(arrays)))

    def varying(array):
        missing = tuple(axes - jax.typeof(array).manual_axis_type.varying)
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(varying, arrays)
