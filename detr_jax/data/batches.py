"""Passes over data, as inputs of a `HasFFNs`."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh

from detr_jax.data.dataset import Dataset
from detr_jax.data.features import embed_batch
from detr_jax.data.loading import batches, layout_batches
from detr_jax.data.prefetch import dispatch_ahead
from detr_jax.mesh import mesh_of, shard_batch
from detr_jax.models import Detector


class BatchSource(Protocol):
    """Batches for a `HasFFNs`, determined by the number of the pass and the position in it."""

    def __len__(self) -> int:
        """Number of batches in a pass."""

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Any]:
        """Batches of a pass from position `start` on."""


class ImageBatches:
    """Images of a data set through the backbone of a detector, on its devices, read again in every pass.

    A batch has `batch_size` images over all devices. A `shuffle_seed` gives every pass another order.
    """

    def __init__(self, model: Detector, dataset: Dataset, batch_size: int, shuffle_seed: int | None = None):
        self._model, self._dataset, self._batch_size, self._seed = model, dataset, batch_size, shuffle_seed

    def __len__(self) -> int:
        sizes, name = self._dataset.image_sizes(), self._dataset.image_name
        return len(layout_batches(sizes, self._model.preprocessing, self._batch_size, image_name=name))

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Any]:
        mesh, load = mesh_of(self._model), partial(batches, shuffle_seed=self._seed, epoch=epoch, start=start)
        loaded = load(self._dataset, self._model.preprocessing, self._batch_size, mesh=mesh)
        return dispatch_ahead(embed_batch(self._model, batch, mesh) for batch in loaded)


class CachedBatches:
    """Batches in memory, such as the tokens of an embedded data set.

    A `shuffle_seed` gives every pass another order. Where the devices of a `mesh` share every batch, see
    `detr_jax.mesh`, `stored` has the rows of this process.
    """

    def __init__(self, stored: Sequence[Any], shuffle_seed: int | None = None, mesh: Mesh | None = None):
        self._stored, self._seed, self._mesh = stored, shuffle_seed, mesh

    def __len__(self) -> int:
        return len(self._stored)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Any]:
        order = np.arange(len(self._stored))
        if self._seed is not None:
            order = np.random.default_rng([self._seed, epoch]).permutation(order)
        return (shard_batch(self._mesh, self._stored[i]) for i in order[start:])
