"""Many devices, of one host or of several: images are shared among them, everything else is on each.

Batches go where the detector is. `replicate` puts it on every device of the job; batches are then shared by image, and
each host loads only its own. Results do not change.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from detr_jax.errors import InputError

AXIS = "images"

Tree = TypeVar("Tree")


def join_cluster() -> None:
    """Connects this process with the others of its job, if it is one of several; before anything touches a device.

    That is so on the hosts of a TPU pod, in a SLURM step of several tasks, and where JAX_COORDINATOR_ADDRESS
    (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID are set.

    Raises:
        InputError: if only some of the three variables are set, or the last two are no numbers.
    """
    if jax.distributed.is_initialized():
        return
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if given:
        if missing := [name for name in names if name not in given]:
            raise InputError(f"{', '.join(given)} without {', '.join(missing)}: set all three or none")
        for name in names[1:]:
            if not given[name].isdigit():
                raise InputError(f"{name} is {given[name]!r}, not a number")
        count, index = int(given[names[1]]), int(given[names[2]])
        jax.distributed.initialize(given[names[0]], count, index, cluster_detection_method="deactivate")
        return
    in_slurm_step = "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1
    # JAX sets the variable as it is imported where it finds libtpu and TPU chips.
    platforms = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
    on_tpu_vm = os.environ.get("TPU_ML_PLATFORM") == "JAX" and "tpu" in platforms
    if in_slurm_step or on_tpu_vm:
        jax.distributed.initialize()


def is_first_process() -> bool:
    """Whether this process writes what all have computed."""
    return jax.process_index() == 0


def first_process_agrees(agrees: bool) -> bool:
    """The first process' value in each; returns once every process is here."""
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(agrees)))


def replicate(tree: Tree) -> Tree:
    """The arrays of a pytree on every device of the job; where there is one, as they are."""
    if jax.device_count() == 1:
        return tree
    # By process, so that the images of one host are consecutive.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return _place(tree, Mesh(np.array(devices), (AXIS,)), P())


def replicate_like(tree: Any, other: Tree) -> Tree:
    """The arrays of `other` on every device that `tree` was replicated over."""
    mesh = mesh_of(tree)
    return other if mesh is None else _place(other, mesh, P())


def mesh_of(tree: Any) -> Mesh | None:
    """The devices that `replicate` put a pytree on, or None where it did not."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == (AXIS,):
            return cast(Mesh, sharding.mesh)  # of arrays, which are somewhere
    return None


def on_every_device(outputs: Tree, mesh: Mesh | None) -> Tree:
    """Outputs of a compiled function that every device is to have."""
    return outputs if mesh is None else jax.lax.with_sharding_constraint(outputs, NamedSharding(mesh, P()))


def local_slice(mesh: Mesh | None, batch_size: int) -> slice:
    """The images of a batch that this process loads; an InputError if the devices cannot share the batch."""
    if mesh is None:
        return slice(0, batch_size)
    if batch_size % mesh.size:
        raise InputError(
            f"a batch of {batch_size} images cannot be shared by {mesh.size} devices; its size has to be a multiple of "
            f"{mesh.size}"
        )
    part = batch_size // jax.process_count()
    return slice(jax.process_index() * part, (jax.process_index() + 1) * part)


def shard_batch(mesh: Mesh | None, own: Tree) -> Tree:
    """Arrays of a whole batch, on the devices that share it, from this process' rows of them."""
    return own if mesh is None else _place(own, mesh, P(AXIS))


def _place(tree: Tree, mesh: Mesh, spec: P) -> Tree:
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree)


def map_shards(mesh: Mesh | None, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A function of replicated arrays and of images that runs on each device for its own images.

    Kernels need that: the compiler cannot divide them among devices. Outputs have an axis of images, or one entry for
    each device, in front.
    """
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(AXIS), check_vma=False)


def sum_shards(mesh: Mesh | None, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """As `map_shards`, but outputs are sums over images, and on each device those over all."""
    if mesh is None:
        return function

    def summed(replicated: Any, images: Any) -> Any:
        return jax.lax.psum(function(replicated, images), AXIS)

    return jax.shard_map(summed, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(), check_vma=False)


def to_host(tree: Tree) -> Tree:
    """Results as numpy arrays, whole on every host."""
    mesh = mesh_of(tree)
    if mesh is not None and jax.process_count() > 1:
        tree = _gather(tree, mesh)
    return jax.device_get(tree)


_gather = jax.jit(on_every_device, static_argnames="mesh")


def to_host_local(tree: Tree) -> Tree:
    """This process' rows of what the devices share, as numpy arrays."""
    mesh = mesh_of(tree)
    if mesh is not None and jax.process_count() > 1:
        tree = multihost_utils.global_array_to_host_local_array(tree, mesh, P(AXIS))
    return jax.device_get(tree)
