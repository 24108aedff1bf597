"""A second architecture: two token grids, two sizes of tokens and of FFNs, sigmoid outputs without "no object"."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from detr_jax.models import Detections, Detector, FFNSpec, Preprocessing, Selectors, register
from detr_jax.models.boxes import corners
from detr_jax.models.ffn import FFN, FFNTrace
from detr_jax.models.positions import downsample_mask, sine_positions

STRIDES = (8, 16)
FINE = 8
"""Features of the narrow FFN, which sees the fine grid alone."""


@dataclass(frozen=True)
class ToyConfig:
    """Sizes of a `ToyDetector`."""

    labels: tuple[str, ...] = ("", "cat", "dog")
    d_model: int = 16
    hidden: int = 32
    fine_hidden: int = 24
    queries: int = 5
    preprocessing: Preprocessing = Preprocessing(32, 64, stride=max(STRIDES))  # noqa: RUF009


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ToyFeatures:
    """Tokens (batch, tokens, d) of both grids, and which of them are of an image."""

    x: tuple[jax.Array, ...]
    mask: tuple[jax.Array, ...]
    valid: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ToyOutputs:
    """Log-odds (batch, queries, classes) and boxes (batch, queries, 4)."""

    log_odds: jax.Array
    boxes: jax.Array
    traces: dict[str, FFNTrace] | None = None


class ToyDetector(Detector):
    """Patches of two sizes, an FFN on the fine ones, an FFN on all, attention of queries, an FFN on queries."""

    def __init__(self, config: ToyConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        d, linear = config.d_model, nnx.Linear
        self.patches = nnx.List([linear(stride * stride * 3, d, dtype=dtype, rngs=rngs) for stride in STRIDES])
        self.narrow, self.widen = (linear(*sizes, dtype=dtype, rngs=rngs) for sizes in ((d, FINE), (FINE, d)))
        self.fine = FFN(FINE, config.fine_hidden, dtype=dtype, rngs=rngs)
        self.both = FFN(d, config.hidden, dtype=dtype, rngs=rngs)
        self.of_queries = FFN(d, config.hidden, dtype=dtype, rngs=rngs)
        self.embeddings = nnx.Param(jax.random.normal(rngs.params(), (config.queries, d)))
        self.head = linear(d, len(config.labels) + 4, rngs=rngs)

    @property
    def ffns(self) -> dict[str, FFN]:
        return {"fine": self.fine, "both": self.both, "queries": self.of_queries}

    def ffn_specs(self) -> dict[str, FFNSpec]:
        d, hidden = self.config.d_model, self.config.hidden
        return {
            "fine": FFNSpec(FINE, self.config.fine_hidden, "image", (0,)),
            "both": FFNSpec(d, hidden, "image", (0, 1)),
            "queries": FFNSpec(d, hidden, "query"),
        }

    @property
    def strides(self) -> tuple[int, ...]:
        return STRIDES

    def embed(self, pixel_values: jax.Array, pixel_mask: jax.Array, valid: jax.Array) -> ToyFeatures:
        batch, height, width, _ = pixel_values.shape
        tokens, masks = [], []
        for (rows, columns), stride, patch in zip(
            self.token_grids((height, width)), STRIDES, self.patches, strict=True
        ):
            missing = ((0, 0), (0, rows * stride - height), (0, columns * stride - width), (0, 0))
            pixels = jnp.pad(jnp.asarray(pixel_values, self.dtype), missing)
            pixels = pixels.reshape(batch, rows, stride, columns, stride, 3).swapaxes(2, 3)
            mask = downsample_mask(jnp.asarray(pixel_mask, bool), rows, columns)
            x = patch(pixels.reshape(batch, rows, columns, stride * stride * 3))
            x += sine_positions(mask, x.shape[-1]).astype(x.dtype)
            tokens.append(x.reshape(batch, rows * columns, x.shape[-1]))
            masks.append(mask.reshape(batch, -1))
        return ToyFeatures(tuple(tokens), tuple(masks), valid)

    def transform(
        self, features: ToyFeatures, *, selectors: Selectors | None = None, trace: bool = False
    ) -> ToyOutputs:
        run, traces = self.ffn_runner(selectors, features.valid, trace)
        fine, coarse = features.x
        mask = jnp.concatenate(features.mask, axis=1)
        narrow = self.narrow(fine)
        fine += self.widen(narrow + run("fine", narrow, features.mask[0]))
        x = jnp.concatenate([fine, coarse], axis=1)
        x += run("both", x, mask)
        queries = jnp.broadcast_to(self.embeddings[...].astype(x.dtype), (x.shape[0], *self.embeddings.shape))
        scores = jnp.where(mask[:, None], queries @ x.swapaxes(1, 2), -1e9)
        queries += jax.nn.softmax(scores) @ x
        queries += run("queries", queries, jnp.ones(queries.shape[:2], bool))
        found = self.head(queries.astype(jnp.float32))
        return ToyOutputs(found[..., :-4], jax.nn.sigmoid(found[..., -4:]), traces)

    def query_predictions(self, outputs: ToyOutputs) -> tuple[jax.Array, jax.Array]:
        return jax.nn.sigmoid(outputs.log_odds), outputs.boxes

    def detections(self, outputs: ToyOutputs, sizes: jax.Array) -> Detections:
        scores = jax.nn.sigmoid(outputs.log_odds)
        boxes = corners(outputs.boxes) * jnp.tile(sizes[:, None, ::-1], 2).astype(jnp.float32)
        return Detections(scores.max(-1), scores.argmax(-1).astype(jnp.int32), boxes)

    def divergence(self, dense: ToyOutputs, sparse: ToyOutputs) -> jax.Array:
        def change(of: Any) -> jax.Array:
            return jnp.abs(of(dense) - of(sparse)).mean((1, 2))

        return change(lambda o: jax.nn.sigmoid(o.log_odds)) + change(lambda o: o.boxes)


register("toy", ToyConfig, ToyDetector)


def toy_detector(seed: int = 0, dtype: jnp.dtype = jnp.float32) -> ToyDetector:
    """A toy with random parameters, whose hidden neurons are mostly inactive."""
    model, rng = ToyDetector(ToyConfig(), dtype=dtype, rngs=nnx.Rngs(seed)), np.random.default_rng(seed)
    for ffn in model.ffns.values():
        for parameter in (ffn.w_in, ffn.w_out):
            parameter[...] = jnp.asarray(rng.normal(0, 0.2, parameter.shape), jnp.float32)
        ffn.b_in[...] = jnp.full(ffn.b_in.shape, -0.7)
    return model
