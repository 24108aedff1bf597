"""A detector's parameters by name, and their fingerprint."""

import hashlib

import jax
import numpy as np
from flax import nnx


def named_parameters(model: nnx.Module) -> dict[str, jax.Array]:
    """All arrays of a module, batch norm statistics included, under their state paths joined by "." and sorted."""
    state = nnx.to_flat_state(nnx.state(model))
    return dict(sorted((".".join(map(str, path)), variable[...]) for path, variable in state))


def fingerprint(model: nnx.Module) -> str:
    """SHA-256 of the names, shapes, dtypes and bytes of all parameters, in order of their names, as hex digits."""
    digest = hashlib.sha256()
    for name, array in named_parameters(model).items():
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()
