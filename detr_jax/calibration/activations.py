"""Activation statistics of FFN hidden units, summed over batches: selectors and permutations are made from them."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax import safetensors_io
from detr_jax.calibration.accumulate import accumulate, add_by_name
from detr_jax.calibration.token_kinds import KINDS, kinds_for, kinds_of_queries, object_tokens, query_targets
from detr_jax.data.batches import BatchSource
from detr_jax.data.dataset import Dataset
from detr_jax.data.loading import Batch, batches, layout_batches
from detr_jax.data.prefetch import dispatch_ahead
from detr_jax.errors import InputError
from detr_jax.mesh import is_first_process, mesh_of, shard_batch, to_host
from detr_jax.models import Detector, FFNTrace, HasFFNs
from detr_jax.models.detr.matching import Targets
from detr_jax.models.parameters import fingerprint
from detr_jax.pytrees import Array, Sums, pytree
from detr_jax.safetensors_io import Arrays, Format, Header

_DROPPED = ("group_norms", "output_norms", "hidden_magnitudes", "input_magnitudes")


def _from_1(header: Header, arrays: Arrays) -> tuple[Header, Arrays]:
    """Version 2 leaves out four statistics that nothing read."""
    return header, {name: array for name, array in arrays.items() if not name.endswith(_DROPPED)}


def _from_2(header: Header, arrays: Arrays) -> tuple[Header, Arrays]:
    """Version 3 is of neurons alone and has no group size."""
    description = json.loads(header["description"])
    if isinstance(description, dict):
        description.pop("group_size", None)
    return header | {"description": json.dumps(description)}, arrays


FORMAT = Format(
    "detr-jax-activations", 3, "activation statistics", "profile_activations makes one", {1: _from_1, 2: _from_2}
)


@pytree
class ActivationStatistics(Sums):
    """Sums over the tokens of an FFN, in K kinds of tokens; of one batch as int32 and float32, of many as 64 bits."""

    images: Array
    """() number of images."""
    tokens: Array
    """(K,) number of tokens."""
    fired: Array
    """(K, F) tokens for which the neuron fires, that is has an activation above 0."""
    coactive: Array
    """(F, F) tokens of any kind for which both neurons fire; its diagonal is the sum of `fired`."""
    images_fired: Array
    """(F,) images with a token for which the neuron fires."""
    hidden: Array
    """(K, F) sum of the activations h."""


def require_active(statistics: Mapping[str, ActivationStatistics], data: str) -> None:
    """Raises an InputError if the output of an FFN is a constant that no method can be fitted to: none is active.

    `statistics` are those of each FFN by name, `data` is the name of the images or inputs.
    """
    for name, of_ffn in statistics.items():
        if not np.diagonal(np.asarray(of_ffn.coactive)).any():
            raise InputError(
                f"no neuron of {name} is active on {data}: its output is a constant, and there is nothing to select"
            )


@partial(jax.jit, static_argnames="kinds_count")
def measure(trace: FFNTrace, kinds: jax.Array, *, kinds_count: int) -> ActivationStatistics:
    """The statistics of one batch; raises an InputError if it is so large that its counts could overflow.

    `kinds` are (batch, tokens) int, from 0 to K - 1; negative for tokens that do not count, beside those that the trace
    calls padding.
    """
    features = trace.hidden.shape[-1]
    if (pairs := trace.hidden.size) >= 2**31 or pairs // features >= 2**24:
        raise InputError(f"a batch of {trace.hidden.shape} activations is too large to be counted; use smaller batches")
    kinds = jnp.where(trace.tokens, kinds, -1)
    counted = kinds >= 0
    hidden = trace.hidden.astype(jnp.float32)
    fires = (hidden > 0) & counted[..., None]

    def per_kind(values: jax.Array) -> jax.Array:  # sums of (batch, tokens, n)
        return jnp.stack([jnp.where((kinds == k)[..., None], values, 0).sum((0, 1)) for k in range(kinds_count)])

    ones = fires.reshape(-1, features).astype(jnp.float32)  # counts below 2^24 are exact
    return ActivationStatistics(
        images=counted.any(1).sum(),
        tokens=per_kind(jnp.ones_like(kinds)[..., None])[:, 0],
        fired=per_kind(fires.astype(jnp.int32)),
        coactive=(ones.T @ ones).astype(jnp.int32),
        images_fired=fires.any(1).sum(0),
        hidden=per_kind(hidden),
    )


def measure_activations(model: HasFFNs, batches: BatchSource) -> dict[str, ActivationStatistics]:
    """Activation statistics by FFN while all run dense, all tokens being of one kind; raises as `accumulate`."""
    return accumulate(_measure_batch, model, batches, "measure activations")


@jax.jit
def _measure_batch(model: HasFFNs, batch: Any) -> dict[str, ActivationStatistics]:
    return {
        name: measure(trace, jnp.zeros_like(trace.tokens, int), kinds_count=1)
        for name, trace in model.traces(batch, {}).items()
    }


@dataclass(frozen=True)
class ActivationProfile:
    """Activation statistics of a detector's FFNs, and what they were made from."""

    fingerprint: str
    """Of the detector, see `detr_jax.fingerprint`."""
    data: str
    """Name of the data set."""
    kinds: dict[str, tuple[str, ...]]
    """Names of the kinds of tokens of each FFN."""
    batches: int
    """Number of batches that were measured, from which a pass resumes."""
    statistics: dict[str, ActivationStatistics]
    """Of each FFN by name."""


_ARRAYS = tuple(field.name for field in dataclasses.fields(ActivationStatistics))


def save_profile(profile: ActivationProfile, path: Path) -> None:
    """Writes statistics; the file appears under its name only once it is whole."""
    described = dict(vars(profile))
    statistics = described.pop("statistics").items()
    arrays = {f"{name}.{array}": value for name, of_ffn in statistics for array, value in vars(of_ffn).items()}
    safetensors_io.write(path, FORMAT, described, arrays)


def load_profile(path: Path, fingerprint: str) -> ActivationProfile:
    """Reads the statistics of a detector.

    Raises:
        MissingFileError: if there is no such file.
        InputError: if the file is damaged, holds no statistics, is of another version, or of another detector.
    """
    described, arrays = safetensors_io.read(path, FORMAT)
    try:
        described["kinds"] = {name: tuple(kinds) for name, kinds in described["kinds"].items()}
        statistics = {
            name: ActivationStatistics(**{array: arrays.pop(f"{name}.{array}") for array in _ARRAYS})
            for name in described["kinds"]
        }
        profile = ActivationProfile(statistics=statistics, **described)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error!r} is missing or wrong") from error
    if arrays:
        raise InputError(f"{path} is damaged: entries {sorted(arrays)} belong to no FFN")
    if profile.fingerprint != fingerprint:
        raise InputError(
            f"{path} has statistics of the detector {profile.fingerprint[:12]}, this one is {fingerprint[:12]}: they "
            "say nothing about other parameters; measure this detector"
        )
    return profile


def profile_activations(
    model: Detector,
    dataset: Dataset,
    batch_size: int,
    path: Path,
    report: Callable[[int], None],
    *,
    checkpoint_batches: int = 50,
) -> ActivationProfile:
    """Activation statistics of every FFN on a data set; resumes from what an interrupted pass left at `path`.

    Args:
        model: the detector, which runs dense, on one device or replicated over several by `detr_jax.mesh`.
        dataset: images with their objects.
        batch_size: images per batch, over all devices.
        path: of the safetensors file of the statistics.
        report: called with the number of images of every batch, at the beginning with that of the earlier ones.
        checkpoint_batches: batches after which the file is written.

    Raises:
        InputError: if the devices cannot share a batch, or the file is of another detector, data set or batch size.
    """
    mesh, own = mesh_of(model), fingerprint(model)
    data = f"{dataset.name}, {len(dataset)} images in batches of {batch_size}"
    kinds: dict[str, tuple[str, ...]] = {name: KINDS[spec.tokens] for name, spec in model.ffn_specs().items()}
    profile = load_profile(path, own) if path.exists() else ActivationProfile(own, data, kinds, 0, {})
    if profile.data != data:
        raise InputError(f"{path} has statistics of {profile.data}, not of {data}; choose another file")

    layouts = layout_batches(dataset.image_sizes(), model.preprocessing, batch_size, image_name=dataset.image_name)
    report(sum(len(layout.indices) for layout in layouts[: profile.batches]))

    def compute(batch: Batch) -> tuple[int, dict[str, ActivationStatistics]]:
        kinds = object_tokens(batch, model), query_targets(batch, model.queries)
        return int(batch.valid.sum()), _measure_images(
            model, *shard_batch(mesh, (batch.pixel_values, batch.pixel_mask, *kinds))
        )

    loaded = batches(dataset, model.preprocessing, batch_size, start=profile.batches, mesh=mesh)
    for images, computed in dispatch_ahead(map(compute, loaded)):
        statistics = add_by_name(profile.statistics, to_host(computed))
        profile = dataclasses.replace(profile, batches=profile.batches + 1, statistics=statistics)
        report(images)
        if (profile.batches % checkpoint_batches == 0 or profile.batches == len(layouts)) and is_first_process():
            save_profile(profile, path)
    return profile


@jax.jit
def _measure_images(
    model: Detector, pixel_values: jax.Array, pixel_mask: jax.Array, on_object: tuple[jax.Array, ...], targets: Targets
) -> dict[str, ActivationStatistics]:
    outputs = model(pixel_values, pixel_mask, trace=True)
    of_queries = kinds_of_queries(model, outputs, on_object, targets)
    return {
        name: measure(outputs.traces[name], kinds_for(spec, on_object, of_queries), kinds_count=2)
        for name, spec in model.ffn_specs().items()
    }
