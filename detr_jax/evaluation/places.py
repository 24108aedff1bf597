"""Where neurons fire and are computed: by stride of image tokens, over objects and background, and by query."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from detr_jax.calibration.token_kinds import KINDS, kinds_for, kinds_of_queries, object_tokens, query_targets
from detr_jax.data.dataset import Dataset
from detr_jax.data.loading import Batch, batches
from detr_jax.data.prefetch import dispatch_ahead
from detr_jax.evaluation.counts import neurons_computed
from detr_jax.mesh import to_host
from detr_jax.models import Detector, FFNSpec, FFNTrace, Selectors
from detr_jax.models.detr.matching import Targets


@dataclass(frozen=True)
class PlaceDensity:
    """Of the tokens of an FFN in one kind of place."""

    tokens: int
    fired: float
    """Share of the hidden activations that are above 0, as the dense FFN has them for these inputs."""
    computed: float
    """Share of the hidden neurons that the selector keeps."""


def places_of(model: Detector, spec: FFNSpec) -> tuple[str, ...]:
    """Names of the places of an FFN's tokens, in order: by grid, then `KINDS`."""
    if spec.tokens == "query":
        return KINDS["query"]
    return tuple(f"stride {model.strides[grid]}, {kind}" for grid in spec.grids for kind in KINDS["image"])


def density_by_place(
    model: Detector,
    dataset: Dataset,
    batch_size: int,
    selectors: Selectors | None = None,
    *,
    progress: str | None = "activity by place",
) -> dict[str, dict[str, PlaceDensity]]:
    """Density of every FFN by name, and in it by place, see `places_of`.

    Args:
        model: the detector, on one device.
        dataset: images with their objects.
        batch_size: images per batch.
        selectors: of the FFNs; None for the dense detector.
        progress: title of the progress bar; None for none.
    """

    def compute(batch: Batch) -> tuple[int, dict[str, jax.Array]]:
        kinds = object_tokens(batch, model), query_targets(batch, model.queries)
        images = batch.pixel_values, batch.pixel_mask
        return int(batch.valid.sum()), _count(model, *images, *kinds, selectors or {})

    totals: dict[str, Any] = {}
    with tqdm(total=len(dataset), unit="image", desc=progress, disable=progress is None) as bar:
        for images, computed in dispatch_ahead(map(compute, batches(dataset, model.preprocessing, batch_size))):
            counts = {name: array.astype(int) for name, array in to_host(computed).items()}
            totals = jax.tree.map(operator.add, totals, counts) if totals else counts
            bar.update(images)
    return {name: _shares(model, spec, totals[name]) for name, spec in model.ffn_specs().items()}


def _shares(model: Detector, spec: FFNSpec, counts: Any) -> dict[str, PlaceDensity]:
    return {
        place: PlaceDensity(int(tokens), fired / max(tokens * spec.hidden, 1), computed / max(tokens * spec.hidden, 1))
        for place, (tokens, fired, computed) in zip(places_of(model, spec), counts.tolist(), strict=True)
    }


@jax.jit
def _count(
    model: Detector,
    pixel_values: jax.Array,
    pixel_mask: jax.Array,
    on_object: tuple[jax.Array, ...],
    targets: Targets,
    selectors: Mapping[str, Any],
) -> dict[str, jax.Array]:
    """(places, 3) of each FFN: tokens, pairs of token and neuron that fire, and those that are computed."""
    outputs = model(pixel_values, pixel_mask, selectors=selectors, trace=True)
    of_queries = kinds_of_queries(model, outputs, on_object, targets)

    def places(spec: FFNSpec) -> jax.Array:  # (batch, tokens), below 0 for none
        of_grids = {grid: 2 * index for index, grid in enumerate(spec.grids)}
        numbered = [jnp.where(kind >= 0, kind + of_grids.get(grid, 0), -1) for grid, kind in enumerate(on_object)]
        return kinds_for(spec, tuple(numbered), of_queries)

    return {
        name: _count_ffn(outputs.traces[name], places(spec), len(places_of(model, spec)))
        for name, spec in model.ffn_specs().items()
    }


def _count_ffn(trace: FFNTrace, places: jax.Array, count: int) -> jax.Array:
    fired, computed = (trace.hidden > 0).sum(-1), neurons_computed(trace).sum(-1)
    per_token = jnp.stack([jnp.ones_like(fired), fired, computed], axis=-1)
    here = (places[..., None] == jnp.arange(count)) & trace.tokens[..., None]
    return jnp.einsum("btp,btn->pn", here.astype(jnp.int32), per_token)
