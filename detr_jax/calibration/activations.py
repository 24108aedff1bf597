"""What the hidden neurons of an FFN do over many images: the statistics that selectors and orders are made from.

`measure` takes the numbers of one batch and is jittable; `ActivationStatistics` adds them up without overflow and is
kept as a safetensors file. Both know one FFN and the tokens that went through it, not the detector around it.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax import safetensors_io
from detr_jax.errors import InputError
from detr_jax.methods.grouping import group_count
from detr_jax.models import FFNTrace, FFNWeights
from detr_jax.safetensors_io import Format

FORMAT = Format("detr-jax-activations", 1, "activation statistics", "profile_activations makes one")

BINS_PER_OCTAVE = 32
OCTAVES = (-16, 8)
MAGNITUDES = np.exp2(np.arange(OCTAVES[0] * BINS_PER_OCTAVE, OCTAVES[1] * BINS_PER_OCTAVE + 1) / BINS_PER_OCTAVE)
"""Edges of the histograms of magnitudes: a quantile is exact to 2.2 %."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ActivationStatistics:
    """Sums over the tokens of an FFN, in K kinds of tokens; of one batch as int32 and float32, of many as 64 bits.

    Attributes:
        images: () number of images.
        tokens: (K,) number of tokens.
        fired: (K, F) tokens for which the neuron fires, that is has an activation above 0.
        coactive: (F, F) tokens of any kind for which both neurons fire; its diagonal is the sum of `fired`.
        images_fired: (F,) images with a token for which the neuron fires.
        hidden: (K, F) sum of the activations h.
        group_norms: (K, G) sum of the norms ||h_g|| of each group's activations.
        output_norms: (K, G) sum of the norms ||h_g W_out,g|| of what each group adds to the output.
        hidden_magnitudes: (K, bins) histogram of |h|: entry 0 counts zeros and what is below the first edge of
            `MAGNITUDES`, entry i what is from edge i - 1 to edge i, the last one the rest.
        input_magnitudes: (K, bins) likewise of |x|.
    """

    images: jax.Array
    tokens: jax.Array
    fired: jax.Array
    coactive: jax.Array
    images_fired: jax.Array
    hidden: jax.Array
    group_norms: jax.Array
    output_norms: jax.Array
    hidden_magnitudes: jax.Array
    input_magnitudes: jax.Array

    def __add__(self, other: "ActivationStatistics") -> "ActivationStatistics":
        """The sum of two in 64 bits; a sum may be added to as often as one likes."""
        return jax.tree.map(lambda a, b: _wide(a) + _wide(b), self, other)

    def of_neurons(self, order: np.ndarray) -> "ActivationStatistics":
        """The same neurons in another order, (F,) as of `sparsity.ordering`.

        Raises:
            ValueError: if groups are of more than one neuron, whose statistics do not tell what other groups would do.
        """
        if self.group_norms.shape[-1] != self.fired.shape[-1]:
            raise ValueError("statistics of groups cannot be put into another order; measure those of single neurons")
        return dataclasses.replace(
            self,
            coactive=self.coactive[order][:, order],
            images_fired=self.images_fired[order],
            **{key: getattr(self, key)[:, order] for key in ("fired", "hidden", "group_norms", "output_norms")},
        )


def require_active(statistics: Mapping[str, ActivationStatistics], data: str) -> None:
    """Refuses FFNs without any activation, whose output is a constant that no method can be fitted to.

    Args:
        statistics: of each FFN by name.
        data: name of the images or inputs.

    Raises:
        InputError: naming the FFN.
    """
    for name, of_ffn in statistics.items():
        if not np.diagonal(np.asarray(of_ffn.coactive)).any():
            raise InputError(
                f"no neuron of {name} is active on {data}: its output is a constant, and there is nothing to select"
            )


def _wide(array: jax.Array | np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    return array.astype(np.int64 if np.issubdtype(array.dtype, np.integer) else np.float64)


@partial(jax.jit, static_argnames=("kinds_count", "group_size"))
def measure(
    weights: FFNWeights, trace: FFNTrace, kinds: jax.Array, *, kinds_count: int, group_size: int
) -> ActivationStatistics:
    """The statistics of one batch.

    Args:
        weights: of the FFN.
        trace: what went through it.
        kinds: (batch, tokens) int, from 0 to K - 1; negative for tokens that do not count, beside those that the trace
            calls padding.
        kinds_count: K.
        group_size: neurons per group.

    Raises:
        ValueError: if the neurons cannot be divided into groups of that size, or the batch is so large that its counts
            could overflow.
    """
    features = trace.hidden.shape[-1]
    groups = group_count(features, group_size)
    if (pairs := trace.hidden.size) >= 2**31 or pairs // features >= 2**24:
        raise InputError(f"a batch of {trace.hidden.shape} activations is too large to be counted; use smaller batches")
    kinds = jnp.where(trace.tokens, kinds, -1)
    counted = kinds >= 0
    hidden = trace.hidden.astype(jnp.float32)
    fires = (hidden > 0) & counted[..., None]

    def per_kind(values: jax.Array) -> jax.Array:
        """Sum of (batch, tokens, n) over the tokens of each kind."""
        return jnp.stack([jnp.where((kinds == k)[..., None], values, 0).sum((0, 1)) for k in range(kinds_count)])

    grouped = hidden.reshape(*hidden.shape[:-1], groups, group_size)
    rows = weights.w_out.astype(jnp.float32).reshape(groups, group_size, -1)
    gram = jnp.einsum("gid,gjd->gij", rows, rows, precision="highest")
    outputs = jnp.einsum("btgi,gij,btgj->btg", grouped, gram, grouped, precision="highest")
    ones = fires.reshape(-1, features).astype(jnp.float32)  # counts below 2^24 are exact
    return ActivationStatistics(
        images=counted.any(1).sum(),
        tokens=per_kind(jnp.ones_like(kinds)[..., None])[:, 0],
        fired=per_kind(fires.astype(jnp.int32)),
        coactive=(ones.T @ ones).astype(jnp.int32),
        images_fired=fires.any(1).sum(0),
        hidden=per_kind(hidden),
        group_norms=per_kind(jnp.sqrt((grouped**2).sum(-1))),
        output_norms=per_kind(jnp.sqrt(jnp.maximum(outputs, 0))),
        hidden_magnitudes=_histogram(hidden, kinds, kinds_count),
        input_magnitudes=_histogram(trace.inputs.astype(jnp.float32), kinds, kinds_count),
    )


def _histogram(values: jax.Array, kinds: jax.Array, kinds_count: int) -> jax.Array:
    """(K, bins) counts of the magnitudes of (batch, tokens, n) values."""
    octave = jnp.log2(jnp.maximum(jnp.abs(values), jnp.finfo(jnp.float32).tiny))
    bins = len(MAGNITUDES) + 1
    index = jnp.clip(jnp.floor((octave - OCTAVES[0]) * BINS_PER_OCTAVE) + 1, 0, bins - 1).astype(jnp.int32)
    row = jnp.broadcast_to(kinds[..., None], values.shape)
    # Index K takes what does not count.
    row = jnp.where(row < 0, kinds_count, row)
    return jnp.zeros((kinds_count + 1, bins), jnp.int32).at[row.ravel(), index.ravel()].add(1)[:-1]


def magnitude_quantile(histogram: np.ndarray, share: float) -> float:
    """The least edge of `MAGNITUDES` below which at least a share of the magnitudes lies.

    Args:
        histogram: (bins,) as in `ActivationStatistics`.
        share: from 0 to 1.

    Returns:
        0 where no magnitude has to be below it, infinity where the last edge is too small.
    """
    if share <= 0:
        return 0.0
    below = np.cumsum(histogram)[:-1]
    enough = np.flatnonzero(below >= share * histogram.sum())
    return float(MAGNITUDES[enough[0]]) if len(enough) else float("inf")


@dataclass(frozen=True)
class ActivationProfile:
    """The statistics of an FFN, or of all FFNs of a detector, and what they were made from.

    Attributes:
        fingerprint: of the detector, see `detr_jax.fingerprint`; for FFNs without one, whatever names them.
        data: name of the data set.
        group_size: neurons per group.
        kinds: names of the kinds of tokens of each FFN.
        batches: number of batches that were measured; where a pass goes on.
        statistics: of each FFN by name.
    """

    fingerprint: str
    data: str
    group_size: int
    kinds: dict[str, tuple[str, ...]]
    batches: int
    statistics: dict[str, ActivationStatistics]

    def plus(self, batch: Mapping[str, ActivationStatistics]) -> "ActivationProfile":
        """With one more batch."""
        added = {
            name: self.statistics[name] + counts if name in self.statistics else jax.tree.map(_wide, counts)
            for name, counts in batch.items()
        }
        return dataclasses.replace(self, batches=self.batches + 1, statistics=added)


_ARRAYS = tuple(field.name for field in dataclasses.fields(ActivationStatistics))
_DESCRIBED = ("fingerprint", "data", "group_size", "kinds", "batches")


def save_profile(profile: ActivationProfile, path: Path) -> None:
    """Writes statistics; the file appears under its name only once it is whole."""
    arrays = {
        f"{name}.{array}": getattr(statistics, array)
        for name, statistics in profile.statistics.items()
        for array in _ARRAYS
    }
    safetensors_io.write(path, FORMAT, {key: getattr(profile, key) for key in _DESCRIBED}, arrays)


def load_profile(path: Path, fingerprint: str) -> ActivationProfile:
    """Reads the statistics of a detector.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, holds no statistics, is of another version, or of another detector.
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
