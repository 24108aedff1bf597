"""Sensitivity of a detector's outputs to errors of an FFN's output, by token and by direction.

With noise e added to the outputs of all FFNs, the gradient g of `Detector.divergence` by the output of one at a token
is about H e, H being the second derivatives; without noise it is zero. The mean of `|g|^2` says how much the token
counts, that of g g^T over tokens in which directions.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.calibration.inputs import drawn_tokens
from detr_jax.mesh import to_host
from detr_jax.models import Detector, FFNWeights, OutputLayer, Selection
from detr_jax.safetensors_io import Arrays

_NOISE = 0.05
"""Standard deviation, as a share of the output's own."""
_DRAWS = 2
"""Of the noise, for each image."""


class Sensitivity(NamedTuple):
    """Of the detector's outputs to errors of one FFN's output, up to a factor."""

    tokens: np.ndarray
    """(tokens,) float32, how much each counts: those of `draw_inputs`."""
    metric: np.ndarray
    """(d, d) float32, how much each direction counts."""


def sensitivity_of(ffn: str, drawn: Arrays) -> Sensitivity:
    """Sensitivity of one FFN by name, from the result of `draw_sensitivities`."""
    return Sensitivity(drawn[f"{ffn}.tokens"], drawn[f"{ffn}.metric"])


def draw_sensitivities(model: Detector, batches: Iterable[Any], count: int, images: int, seed: int) -> Arrays:
    """The sensitivities of all FFNs, for the tokens that `draw_inputs` draws with the same arguments."""
    tokens: dict[str, list[np.ndarray]] = {}
    metrics: dict[str, Any] = {}
    each = max(count // max(images, 1), 1)
    for i, batch in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(seed), i)
        for name, (squares, exists, metric) in to_host(_draw(model, batch, key, each=each)).items():
            tokens.setdefault(name, []).append(squares[exists])
            metrics[name] = metrics.get(name, 0) + metric.astype(np.float64)
    found = {f"{name}.tokens": np.concatenate(of)[:count] for name, of in tokens.items()}
    return found | {f"{name}.metric": of.astype(np.float32) for name, of in metrics.items()}


@partial(jax.jit, static_argnames="each")
def _draw(
    model: Detector, batch: Any, key: jax.Array, *, each: int
) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
    traces, weights, dense = model.traces(batch, {}), model.ffn_weights(), model.transform(batch)

    def change(noise: dict[str, jax.Array]) -> jax.Array:
        changed = model.transform(batch, selectors={name: partial(_shifted, of) for name, of in noise.items()})
        return jnp.where(batch.valid, model.divergence(dense, changed), 0).sum()

    def noise_like(name: str, key: jax.Array) -> jax.Array:
        outputs, exists = traces[name].hidden @ weights[name].w_out, traces[name].tokens[..., None]
        deviation = outputs.std((0, 1), where=exists).mean()
        return (_NOISE * deviation * jax.random.normal(key, outputs.shape)).astype(jnp.float32)

    squares = {name: jnp.zeros(of.tokens.shape) for name, of in traces.items()}
    metrics = {name: jnp.zeros(()) for name in traces}
    for of_draw in jax.random.split(jax.random.fold_in(key, 1), _DRAWS):
        keys = zip(traces, jax.random.split(of_draw, len(traces)), strict=True)
        for name, gradient in jax.grad(change)({name: noise_like(name, key) for name, key in keys}).items():
            gradient = jnp.where(traces[name].tokens[..., None], gradient, 0)
            squares[name] += (gradient**2).sum(-1)
            metrics[name] = metrics[name] + jnp.einsum("btd,bte->de", gradient, gradient)

    def of_ffn(name: str) -> tuple[jax.Array, jax.Array, jax.Array]:
        drawn, exists = drawn_tokens(traces[name].tokens, key, each)
        return jnp.take_along_axis(squares[name], drawn, axis=1), exists, metrics[name]

    return {name: of_ffn(name) for name in traces}


def _shifted(shift: jax.Array, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> Selection:
    """All of an FFN, with a shift (..., tokens, d) of its outputs."""
    return Selection(mask=jnp.ones((1,), x.dtype), second=OutputLayer(ffn.w_out, ffn.b_out + shift))
