"""Deformable DETR's transformer: encoder over the tokens of all levels, decoder over object queries."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from detr_jax.errors import InputError
from detr_jax.kernels.sampling import Shapes
from detr_jax.models.deformable_detr.attention import DeformableAttention
from detr_jax.models.deformable_detr.config import DeformableDetrConfig
from detr_jax.models.detr.modeling import BoxHead
from detr_jax.models.detr.transformer import Branch, attention, layer_norm, named, replicate_queries
from detr_jax.models.ffn import FFN, RunFFN
from detr_jax.models.positions import sine_features
from detr_jax.models.token_selection import KeptTokens, take_tokens, update_layer

EPSILON = 1e-5
"""Least distance of coordinates from 0 and 1 where their log-odds are taken."""
PROPOSAL_SIZE = 0.05
"""Sides of the boxes around tokens of the first level, as fractions of the image; those of each level are doubled."""
FIRST_CLASS, FIRST_SIDE = math.log(0.01 / 0.99), -2.0
"""Log-odds of a class, and of the sides of boxes, before training."""
MARGIN = 0.01
"""Tokens whose boxes have a centre or a size nearer to 0 or 1 than this propose none."""


class Memory(NamedTuple):
    """Tokens of all levels, one level after the other, rows first."""

    x: jax.Array
    """(batch, tokens, d)."""
    mask: jax.Array
    """(batch, tokens) bool, false for padding."""
    shapes: Shapes
    ratios: jax.Array
    """(batch, levels, 2) float32, share of each level's width and height that is not padding."""


def log_odds(x: jax.Array) -> jax.Array:
    """Inverse of the sigmoid; of coordinates at or beyond 0 and 1, of ones a little inside."""
    x = jnp.clip(x, 0, 1)
    return jnp.log(jnp.maximum(x, EPSILON)) - jnp.log(jnp.maximum(1 - x, EPSILON))


def level_grids(memory: Memory) -> list[jax.Array]:
    """Centres of each level's cells (batch, height, width, 2), as fractions of the unpadded image."""
    grids = []
    for level, (height, width) in enumerate(memory.shapes):
        cells = jnp.stack(jnp.meshgrid(jnp.arange(width) + 0.5, jnp.arange(height) + 0.5), axis=-1)
        sides = memory.ratios[:, level] * jnp.asarray((width, height), jnp.float32)
        grids.append(cells / sides[:, None, None])
    return grids


class EncoderLayer(nnx.Module):
    """Deformable attention of the tokens of all levels to each other, then the FFN."""

    def __init__(self, config: DeformableDetrConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        heads, points = config.encoder_heads, config.encoder_points
        self.self_attention = DeformableAttention(config, heads, points, dtype=dtype, rngs=rngs)
        self.norm1 = layer_norm(config, dtype, rngs)
        self.ffn = FFN(config.d_model, config.encoder_ffn_dim, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(config, dtype, rngs)

    def __call__(
        self, memory: Memory, positions: jax.Array, references: jax.Array, run: Branch, rows: jax.Array | None = None
    ) -> jax.Array:
        """New features of the tokens of `rows` (batch, k), of all for None."""
        of_rows = (lambda array: array) if rows is None else partial(take_tokens, rows=rows)
        x, positions, references = of_rows(memory.x), of_rows(positions), of_rows(references)
        mixed = self.self_attention(x + positions, references, memory.x, memory.mask, memory.shapes)
        x = self.norm1(x + mixed)
        return self.norm2(x + run(x))


class DecoderLayer(nnx.Module):
    """Self-attention among queries, deformable attention to the image tokens, then the FFN."""

    def __init__(self, config: DeformableDetrConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        heads, points = config.decoder_heads, config.decoder_points
        self.self_attention = attention(config, heads, dtype, rngs)
        self.norm1 = layer_norm(config, dtype, rngs)
        self.cross_attention = DeformableAttention(config, heads, points, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(config, dtype, rngs)
        self.ffn = FFN(config.d_model, config.decoder_ffn_dim, dtype=dtype, rngs=rngs)
        self.norm3 = layer_norm(config, dtype, rngs)

    def __call__(
        self, x: jax.Array, positions: jax.Array, references: jax.Array, memory: Memory, run: Branch
    ) -> jax.Array:
        located = x + positions
        x = self.norm1(x + self.self_attention(located, located, x))
        mixed = self.cross_attention(x + positions, references, memory.x, memory.mask, memory.shapes)
        x = self.norm2(x + mixed)
        return self.norm3(x + run(x))


class Proposals(nnx.Module):
    """Object queries from the image tokens of highest class probability (Zhu et al. 2021, appendix A.4)."""

    def __init__(self, config: DeformableDetrConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        d_model = config.d_model
        self.tokens = nnx.Linear(d_model, d_model, dtype=dtype, rngs=rngs)
        self.tokens_norm = layer_norm(config, dtype, rngs)
        self.positions = nnx.Linear(2 * d_model, 2 * d_model, dtype=dtype, rngs=rngs)
        self.positions_norm = layer_norm(config, dtype, rngs, features=2 * d_model)
        self.queries = config.queries

    def __call__(self, memory: Memory, class_head: nnx.Linear, box_head: BoxHead) -> tuple[jax.Array, jax.Array]:
        """Features (batch, queries, 2 d) of queries, positions first, and their boxes (batch, queries, 4).

        Raises:
            InputError: if there are fewer tokens than queries.
        """
        if (tokens := memory.x.shape[1]) < self.queries:
            raise InputError(f"{self.queries} queries of a two-stage detector need as many tokens; {tokens} are here")
        boxes = []
        for level, centres in enumerate(level_grids(memory)):
            sizes = jnp.full_like(centres, PROPOSAL_SIZE * 2**level)
            boxes.append(jnp.concatenate([centres, sizes], axis=-1).reshape(len(centres), -1, 4))
        around = jnp.concatenate(boxes, axis=1)
        proposes = ((around > MARGIN) & (around < 1 - MARGIN)).all(-1, keepdims=True) & memory.mask[..., None]
        x = self.tokens_norm(self.tokens(jnp.where(proposes, memory.x, 0))).astype(jnp.float32)
        at = jnp.where(proposes, jnp.log(around) - jnp.log1p(-around), jnp.inf)
        _, best = jax.lax.top_k(class_head(x)[..., 0], self.queries)
        best = best[..., None]
        predicted = jnp.take_along_axis(box_head.log_odds(x) + at, best, axis=1)
        found = jax.lax.stop_gradient(jax.nn.sigmoid(predicted))
        encoded = sine_features(found, memory.x.shape[-1] // 2).reshape(*found.shape[:2], -1)
        return self.positions_norm(self.positions(encoded.astype(memory.x.dtype))), found


class Transformer(nnx.Module):
    """Encoder and decoder, with the object queries and the heads, whose boxes the next layer may start from."""

    def __init__(self, config: DeformableDetrConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.encoder = nnx.List([EncoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.encoder_layers)])
        self.decoder = nnx.List([DecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.decoder_layers)])
        self.levels = nnx.Param(jax.random.normal(rngs.params(), (config.levels, config.d_model)))
        if config.two_stage:
            self.proposals = Proposals(config, dtype=dtype, rngs=rngs)
        else:
            self.queries = nnx.Param(jax.random.normal(rngs.params(), (config.queries, 2 * config.d_model)))
            self.reference_points = nnx.Linear(config.d_model, 2, rngs=rngs)
        self.class_heads = nnx.List([nnx.Linear(config.d_model, config.logits, rngs=rngs) for _ in range(config.heads)])
        self.box_heads = nnx.List([BoxHead(config.d_model, rngs=rngs) for _ in range(config.heads)])

    def encode(self, memory: Memory, positions: jax.Array, run: RunFFN, kept: KeptTokens | None = None) -> Memory:
        """Tokens after the encoder; `positions` (batch, tokens, d) tell where they are and of which level.

        `kept` are the tokens that the layers update, None for all.
        """
        return memory._replace(x=self.encoder_steps(memory, positions, run, kept)[-1])

    def encoder_steps(
        self, memory: Memory, positions: jax.Array, run: RunFFN, kept: KeptTokens | None = None
    ) -> list[jax.Array]:
        """Features (batch, tokens, d) before the first and after each layer; arguments as of `encode`."""
        grids = [grid.reshape(len(grid), -1, 2) for grid in level_grids(memory)]
        references = jnp.concatenate(grids, axis=1)[:, :, None] * memory.ratios[:, None]
        steps = [memory.x]
        for index in range(len(self.encoder)):
            update = partial(self._update, index, memory._replace(x=steps[-1]), positions, references, run)
            steps.append(update_layer(steps[-1], memory.mask, kept, index, update))
        return steps

    def _update(
        self,
        index: int,
        memory: Memory,
        positions: jax.Array,
        references: jax.Array,
        run: RunFFN,
        rows: jax.Array | None,
        counted: jax.Array,
    ) -> jax.Array:
        return self.encoder[index](memory, positions, references, named(run, f"encoder.{index}", counted), rows)

    def decode(self, memory: Memory, run: RunFFN) -> list[tuple[jax.Array, jax.Array]]:
        """Features (batch, queries, d) after each decoder layer, and the boxes or points that it looked around."""
        if self.config.two_stage:
            queries, references = self.proposals(memory, self.class_heads[-1], self.box_heads[-1])
        else:
            queries = replicate_queries(self.queries[...], memory.x)
            positions = queries[..., : self.config.d_model]
            references = jax.nn.sigmoid(self.reference_points(positions))
        positions, x = jnp.split(queries.astype(self.dtype), 2, axis=-1)
        every_query = jnp.ones(x.shape[:2], bool)
        outputs = []
        for index, layer in enumerate(self.decoder):
            ratios = jnp.tile(memory.ratios, references.shape[-1] // 2)[:, None]
            branch = named(run, f"decoder.{index}", every_query)
            x = layer(x, positions, references[:, :, None] * ratios, memory, branch)
            outputs.append((x, references))
            if self.config.refine:
                references = jax.lax.stop_gradient(self.boxes(index, x, references))
        return outputs

    def boxes(self, layer: int, x: jax.Array, references: jax.Array) -> jax.Array:
        """(batch, queries, 4) float32, from features after a decoder layer; to points belongs no size."""
        predicted = self.box_heads[layer].log_odds(x.astype(jnp.float32))
        known = references.shape[-1]
        return jax.nn.sigmoid(predicted.at[..., :known].add(log_odds(references)))

    def logits(self, layer: int, x: jax.Array) -> jax.Array:
        """(batch, queries, classes) float32, from features after a decoder layer."""
        return self.class_heads[layer](x.astype(jnp.float32))


def first_heads(transformer: Transformer) -> None:
    """Gives the heads of a new transformer the official code's first values: classes are rare, boxes are small."""
    config = transformer.config
    for classes in transformer.class_heads:
        classes.bias = nnx.Param(jnp.full(config.logits, FIRST_CLASS))
    for boxes in transformer.box_heads:
        boxes.layers[-1].kernel = nnx.Param(jnp.zeros((config.d_model, 4)))
    transformer.box_heads[0].layers[-1].bias = nnx.Param(jnp.array([0, 0, FIRST_SIDE, FIRST_SIDE]))
