"""Random samples of the FFNs' inputs, for methods that are fitted to tokens."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.errors import InputError
from detr_jax.mesh import to_host
from detr_jax.models import FFNTrace, HasFFNs


def draw_inputs(model: HasFFNs, batches: Iterable[Any], count: int, images: int, seed: int) -> dict[str, np.ndarray]:
    """Inputs of every FFN while all run dense, drawn without replacement and without padding.

    Args:
        model: the FFNs.
        batches: data, each of which is needed once.
        count: tokens of each FFN at most, equally many of each image as far as it has so many.
        images: in `batches`.
        seed: of the draw.

    Returns:
        (tokens, d) float32 by name.

    Raises:
        InputError: if there are no images.
    """
    parts: dict[str, list[np.ndarray]] = {}
    each = max(count // max(images, 1), 1)
    for i, batch in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(seed), i)
        for name, (inputs, exists) in to_host(_draw(model, batch, key, each=each)).items():
            parts.setdefault(name, []).append(inputs[exists])
    if not parts:
        raise InputError("there are no images to draw tokens from")
    return {name: np.concatenate(of)[:count] for name, of in parts.items()}


@partial(jax.jit, static_argnames="each")
def _draw(model: HasFFNs, batch: Any, key: jax.Array, *, each: int) -> dict[str, tuple[jax.Array, jax.Array]]:
    def of_ffn(trace: FFNTrace) -> tuple[jax.Array, jax.Array]:
        drawn, exists = drawn_tokens(trace.tokens, key, each)
        return jnp.take_along_axis(trace.inputs, drawn[..., None], axis=1).astype(jnp.float32), exists

    return {name: of_ffn(trace) for name, trace in model.traces(batch, {}).items()}


def drawn_tokens(tokens: jax.Array, key: jax.Array, each: int) -> tuple[jax.Array, jax.Array]:
    """(batch, each) int, tokens of each image, and bool, whether they exist; `tokens` (batch, T) is which do."""
    ranks = jnp.where(tokens, jax.random.uniform(key, tokens.shape), -1.0)
    _, drawn = jax.lax.top_k(ranks, min(each, tokens.shape[1]))
    return drawn, jnp.take_along_axis(tokens, drawn, axis=1)
