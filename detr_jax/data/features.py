"""Backbone features of images: the part of a forward pass that no selector changes, computed once."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from detr_jax.data.dataset import Dataset
from detr_jax.data.loading import Batch, batches
from detr_jax.data.prefetch import dispatch_ahead
from detr_jax.mesh import map_shards, mesh_of, shard_batch, to_host_local
from detr_jax.models import Detector


@dataclass(frozen=True)
class BackboneFeatures:
    """Backbone features of a batch.

    Attributes:
        tokens: output of `Detector.embed` in host memory; where several hosts share the batch, of the own images.
        sizes: (batch, 2) int, original height and width in pixels.
        image_ids: (batch,) int.
        valid: (batch,) bool, false for copies that fill the batch.
        grids: rows and columns of the detector's token grids.
    """

    tokens: Any
    sizes: np.ndarray
    image_ids: np.ndarray
    valid: np.ndarray
    grids: tuple[tuple[int, int], ...]


@partial(jax.jit, static_argnames="mesh")
def _embed(
    model: Detector, pixel_values: jax.Array, pixel_mask: jax.Array, valid: jax.Array, *, mesh: Mesh | None
) -> Any:
    return map_shards(mesh, lambda model, images: model.embed(*images))(model, (pixel_values, pixel_mask, valid))


def embed_batch(model: Detector, batch: Batch, mesh: Mesh | None) -> Any:
    """Output of `Detector.embed` for a batch, on the device of the detector or those that it was replicated over."""
    return _embed(model, *shard_batch(mesh, (batch.pixel_values, batch.pixel_mask, batch.valid[batch.own])), mesh=mesh)


def backbone_features(
    model: Detector, dataset: Dataset, batch_size: int, progress: str | None, *, exact: bool = False
) -> Iterator[BackboneFeatures]:
    """Backbone features of a data set, batch by batch, with a progress bar titled `progress` unless that is None.

    A list of them takes two arrays of tokens x d numbers of host memory per image, and serves any number of passes.
    `exact` means without padding, which compiles for every size of image.

    Raises:
        InputError: if the devices of the detector cannot share a batch.
    """
    mesh = mesh_of(model)
    loaded = batches(dataset, model.preprocessing, batch_size, exact=exact, mesh=mesh)
    with tqdm(total=len(dataset), unit="image", desc=progress, disable=progress is None) as bar:
        for batch, tokens in dispatch_ahead((batch, embed_batch(model, batch, mesh)) for batch in loaded):
            grids = model.token_grids(batch.pixel_mask.shape[1:])
            yield BackboneFeatures(to_host_local(tokens), batch.sizes, batch.image_ids, batch.valid, grids)
            bar.update(int(batch.valid.sum()))
