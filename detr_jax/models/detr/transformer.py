"""DETR's post-norm transformer: encoder over image tokens, decoder over object queries."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from detr_jax.models.detr.config import DetrConfig
from detr_jax.models.ffn import FFN, RunFFN

LAYER_NORM_EPSILON = 1e-5


def softmax_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, mask: jax.Array | None = None, **unused: Any
) -> jax.Array:
    """Attention as `nnx.MultiHeadAttention` calls it, which normalises its results rather than its weights.

    The weights are by far the largest arrays of the transformer; this saves a pass over them.

    Args:
        query: (batch, queries, heads, d), the shape of the result; `key` and `value` are (batch, keys, heads, d).
        mask: (batch, 1, 1, keys) bool, true where to attend; every row has a key to attend to.
        unused: options of the module for dropout and the like.
    """
    exact = jnp.float32  # scores and sums, whatever the dtype of the computation
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key, preferred_element_type=exact)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(exact).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    sums = weights.sum(-1).swapaxes(1, 2)[..., None]
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value, preferred_element_type=exact)
    return (mixed / sums).astype(value.dtype)


def _attention(config: DetrConfig, heads: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.MultiHeadAttention:
    options: dict[str, Any] = {
        "attention_fn": softmax_attention,
        "kernel_init": nnx.initializers.glorot_uniform(),
        "dtype": dtype,
    }
    return nnx.MultiHeadAttention(heads, config.d_model, decode=False, keep_rngs=False, rngs=rngs, **options)


def _norm(config: DetrConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance E[x^2] - E[x]^2 loses digits that parity with torch needs.
    return nnx.LayerNorm(config.d_model, epsilon=LAYER_NORM_EPSILON, use_fast_variance=False, dtype=dtype, rngs=rngs)


def _sharded_like(x: jax.Array, images: jax.Array) -> jax.Array:
    """An array with an axis of images in front, shared among devices as `images` are; products need that of both."""
    sharding = jax.typeof(images).sharding
    if not sharding.mesh.explicit_axes:
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0])))


class EncoderLayer(nnx.Module):
    """Self-attention over image tokens, then the FFN; each added to its input and normalised."""

    def __init__(self, config: DetrConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.self_attention = _attention(config, config.encoder_heads, dtype, rngs)
        self.norm1 = _norm(config, dtype, rngs)
        self.ffn = FFN(config.d_model, config.encoder_ffn_dim, dtype=dtype, rngs=rngs)
        self.norm2 = _norm(config, dtype, rngs)

    def attend(self, x: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
        """The part before the FFN; its result is the FFN's input."""
        located = x + positions
        return self.norm1(x + self.self_attention(located, located, x, mask=mask))


class DecoderLayer(nnx.Module):
    """Self-attention among queries, cross-attention to the image tokens, then the FFN."""

    def __init__(self, config: DetrConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.self_attention = _attention(config, config.decoder_heads, dtype, rngs)
        self.norm1 = _norm(config, dtype, rngs)
        self.cross_attention = _attention(config, config.decoder_heads, dtype, rngs)
        self.norm2 = _norm(config, dtype, rngs)
        self.ffn = FFN(config.d_model, config.decoder_ffn_dim, dtype=dtype, rngs=rngs)
        self.norm3 = _norm(config, dtype, rngs)

    def attend(
        self, x: jax.Array, queries: jax.Array, memory: jax.Array, located_memory: jax.Array, mask: jax.Array
    ) -> jax.Array:
        """The part before the FFN; its result is the FFN's input."""
        located = x + queries
        x = self.norm1(x + self.self_attention(located, located, x))
        return self.norm2(x + self.cross_attention(x + queries, located_memory, memory, mask=mask))


class Transformer(nnx.Module):
    """Encoder and decoder, with the learned object queries."""

    def __init__(self, config: DetrConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.encoder = nnx.List([EncoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.encoder_layers)])
        self.decoder = nnx.List([DecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.decoder_layers)])
        self.decoder_norm = _norm(config, dtype, rngs)
        self.queries = nnx.Param(jax.random.normal(rngs.params(), (config.queries, config.d_model)))
        self.dtype = dtype

    def encode(self, x: jax.Array, positions: jax.Array, tokens: jax.Array, run: RunFFN) -> jax.Array:
        """Image tokens and their position encodings (batch, tokens, d) -> memory (batch, tokens, d).

        `tokens` (batch, tokens) bool is false for padding.
        """
        mask = tokens[:, None, None, :]
        for index, layer in enumerate(self.encoder):
            x = layer.attend(x, positions, mask)
            x = layer.norm2(x + run(f"encoder.{index}", x, tokens))
        return x

    def decode(self, memory: jax.Array, positions: jax.Array, tokens: jax.Array, run: RunFFN) -> list[jax.Array]:
        """Memory -> features (batch, queries, d) of the object queries after each layer, normalised."""
        mask = tokens[:, None, None, :]
        queries = jnp.broadcast_to(self.queries[...].astype(self.dtype), (memory.shape[0], *self.queries.shape))
        queries = _sharded_like(queries, memory)
        located_memory = memory + positions
        every_query = jnp.ones(queries.shape[:2], bool)
        x = _sharded_like(jnp.zeros_like(queries), memory)
        outputs = []
        for index, layer in enumerate(self.decoder):
            x = layer.attend(x, queries, memory, located_memory, mask)
            x = layer.norm3(x + run(f"decoder.{index}", x, every_query))
            outputs.append(self.decoder_norm(x))
        return outputs
