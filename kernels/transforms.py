"""Sharding rules that the operations share."""

import jax


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


def varying_alike(*arrays):
    """Arrays that vary over the same axes inside `jax.shard_map`, as all branches and the state of loops must."""
    axes = frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in jax.tree.leaves(arrays)))

    def varying(array):
        missing = tuple(axes - jax.typeof(array).manual_axis_type.varying)
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(varying, arrays)
