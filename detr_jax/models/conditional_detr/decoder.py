"""Conditional DETR's decoder: content and positions have projections of their own (Meng et al. 2021, section 3)."""

import jax
import jax.numpy as jnp
from flax import nnx

from detr_jax.models.detr.config import DetrConfig
from detr_jax.models.detr.transformer import (
    Branch,
    Transformer,
    layer_norm,
    named,
    replicate_queries,
    softmax_attention,
)
from detr_jax.models.ffn import FFN, RunFFN
from detr_jax.models.perceptron import Perceptron
from detr_jax.models.positions import sine_features


class ConditionalAttention(nnx.Module):
    """Attention whose queries and keys are sums, or per head the concatenation, of content and positions.

    It has those of the queries' projections that are named in `parts`.
    """

    query_content: nnx.Linear
    query_position: nnx.Linear
    query_sine: nnx.Linear
    key_content: nnx.Linear
    key_position: nnx.Linear
    value: nnx.Linear
    out: nnx.Linear

    def __init__(self, config: DetrConfig, parts: tuple[str, ...], *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.heads = config.decoder_heads
        self.attention_fn = softmax_attention
        for name in (*parts, "key_content", "key_position", "value", "out"):
            setattr(self, name, nnx.Linear(config.d_model, config.d_model, dtype=dtype, rngs=rngs))

    def by_head(self, x: jax.Array) -> jax.Array:
        """(batch, tokens, d) -> (batch, tokens, heads, d / heads)."""
        return x.reshape(*x.shape[:-1], self.heads, -1)

    def mix(self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Output for queries and keys by head, and values."""
        mixed = self.attention_fn(query, key, self.by_head(self.value(value)), mask=mask)
        return self.out(mixed.reshape(*mixed.shape[:-2], -1))


class ConditionalDecoderLayer(nnx.Module):
    """Self-attention among queries, conditional cross-attention to the image tokens, then the FFN; post-norm."""

    def __init__(self, config: DetrConfig, first: bool, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        own = ("query_content", "query_position")
        cross = ("query_content", "query_sine", *(["query_position"] if first else []))
        self.self_attention = ConditionalAttention(config, own, dtype=dtype, rngs=rngs)
        self.norm1 = layer_norm(config, dtype, rngs)
        self.cross_attention = ConditionalAttention(config, cross, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(config, dtype, rngs)
        self.ffn = FFN(config.d_model, config.decoder_ffn_dim, dtype=dtype, rngs=rngs)
        self.norm3 = layer_norm(config, dtype, rngs)
        self.first = first

    def __call__(
        self,
        x: jax.Array,
        queries: jax.Array,
        sine: jax.Array,
        memory: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        run: Branch,
    ) -> jax.Array:
        """`sine` (batch, queries, d) encodes the reference points, `run` computes the FFN."""
        own = self.self_attention
        query = own.query_content(x) + own.query_position(queries)
        key = own.key_content(x) + own.key_position(queries)
        x = self.norm1(x + own.mix(own.by_head(query), own.by_head(key), x))

        cross = self.cross_attention
        query, key = cross.query_content(x), cross.key_content(memory)
        key_position = cross.key_position(positions)
        if self.first:
            query, key = query + cross.query_position(queries), key + key_position
        # Per head, so that scores are those of contents plus those of positions (equation 2).
        query = jnp.concatenate([cross.by_head(query), cross.by_head(cross.query_sine(sine))], axis=-1)
        key = jnp.concatenate([cross.by_head(key), cross.by_head(key_position)], axis=-1)
        x = self.norm2(x + cross.mix(query, key, memory, mask))
        return self.norm3(x + run(x))


class ConditionalTransformer(Transformer):
    """DETR's encoder, and a decoder whose queries look near reference points."""

    def __init__(self, config: DetrConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        layers = range(config.decoder_layers)
        self.decoder = nnx.List([ConditionalDecoderLayer(config, i == 0, dtype=dtype, rngs=rngs) for i in layers])
        self.query_scale = Perceptron((config.d_model,) * 3, dtype=dtype, rngs=rngs)
        self.reference_head = Perceptron((config.d_model, config.d_model, 2), dtype=dtype, rngs=rngs)

    def reference_points(self) -> jax.Array:
        """(queries, 2) float32, (x, y) as fractions of the image."""
        return jax.nn.sigmoid(self.reference_head(self.queries[...].astype(self.dtype)).astype(jnp.float32))

    def decode(self, memory: jax.Array, positions: jax.Array, tokens: jax.Array, run: RunFFN) -> list[jax.Array]:
        mask = tokens[:, None, None, :]
        queries = replicate_queries(self.queries[...].astype(self.dtype), memory)
        x, y = self.reference_points().T
        features = queries.shape[-1] // 2
        sine = jnp.concatenate([sine_features(y, features), sine_features(x, features)], axis=-1).astype(self.dtype)
        every_query = jnp.ones(queries.shape[:2], bool)
        x, outputs = replicate_queries(jnp.zeros(self.queries.shape, self.dtype), memory), []
        for index, layer in enumerate(self.decoder):
            scale = self.query_scale(x) if index else jnp.ones_like(queries)
            ffn = named(run, f"decoder.{index}", every_query)
            x = layer(x, queries, sine * scale, memory, positions, mask, ffn)
            outputs.append(self.decoder_norm(x))
        return outputs
