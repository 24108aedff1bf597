"""Images as the transformer sees them: the part of a forward pass that no selector changes, done once."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np
from tqdm import tqdm

from detr_jax.data.dataset import Dataset
from detr_jax.data.loading import Batch, batches
from detr_jax.model import DETR, ImageTokens


@dataclass(frozen=True)
class EmbeddedBatch:
    """A batch behind the backbone.

    Attributes:
        tokens: what the transformer gets, in host memory.
        sizes: (batch, 2) int, original height and width in pixels.
        image_ids: (batch,) int.
        valid: (batch,) bool, false for copies that fill the batch.
        grid: rows and columns of the tokens.
    """

    tokens: ImageTokens
    sizes: np.ndarray
    image_ids: np.ndarray
    valid: np.ndarray
    grid: tuple[int, int]


@jax.jit
def _embed(model: DETR, pixel_values: jax.Array, pixel_mask: jax.Array, valid: jax.Array) -> ImageTokens:
    return model.embed(pixel_values, pixel_mask, valid)


def embed_batch(model: DETR, batch: Batch) -> ImageTokens:
    """What the transformer gets of a batch, on the device."""
    return _embed(model, batch.pixel_values, batch.pixel_mask, batch.valid)


def embedded_batches(model: DETR, dataset: Dataset, batch_size: int, progress: str) -> Iterator[EmbeddedBatch]:
    """One pass over a data set behind the backbone, with a progress bar.

    As a list it takes two arrays of tokens x d numbers of host memory for every image, and serves any number of passes.

    Args:
        model: the detector.
        dataset: the images.
        batch_size: images per batch.
        progress: title of the bar.
    """
    with tqdm(total=len(dataset), unit="image", desc=progress) as bar:
        for batch in batches(dataset, model.config, batch_size):
            tokens = jax.device_get(embed_batch(model, batch))
            grid = model.token_grid(batch.pixel_mask.shape[1:])
            yield EmbeddedBatch(tokens, batch.sizes, batch.image_ids, batch.valid, grid)
            bar.update(int(batch.valid.sum()))
