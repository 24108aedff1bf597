"""DETR's transformer: encoder over image tokens, decoder over object queries."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from detr_jax.models.detr.config import DetrConfig
from detr_jax.models.ffn import FFN, RunFFN
from detr_jax.models.token_selection import KeptTokens, take_tokens, update_layer

LAYER_NORM_EPSILON = 1e-5

Branch = Callable[[jax.Array], jax.Array]


def attention_scores(query: jax.Array, key: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Logarithms (batch, heads, queries, keys) float32 of attention's weights, before they are normalised."""
    exact = jnp.float32
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key, preferred_element_type=exact)
    return scores if mask is None else jnp.where(mask, scores, jnp.finfo(exact).min)


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
    scores = attention_scores(query, key, mask)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    sums = weights.sum(-1).swapaxes(1, 2)[..., None]
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value, preferred_element_type=exact)
    return (mixed / sums).astype(value.dtype)


def attention(config: DetrConfig, heads: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.MultiHeadAttention:
    """Multi-head attention by `softmax_attention`, with the initial weights of the official code."""
    options: dict[str, Any] = {
        "attention_fn": softmax_attention,
        "kernel_init": nnx.initializers.glorot_uniform(),
        "dtype": dtype,
    }
    return nnx.MultiHeadAttention(heads, config.d_model, decode=False, keep_rngs=False, rngs=rngs, **options)


def layer_norm(config: DetrConfig, dtype: jnp.dtype, rngs: nnx.Rngs, features: int | None = None) -> nnx.LayerNorm:
    """A layer norm of the model's features, or of so many."""
    # The fast variance E[x^2] - E[x]^2 loses digits that parity with torch needs.
    options: dict[str, Any] = {"epsilon": LAYER_NORM_EPSILON, "use_fast_variance": False, "dtype": dtype}
    return nnx.LayerNorm(features or config.d_model, rngs=rngs, **options)


def replicate_queries(queries: jax.Array, images: jax.Array) -> jax.Array:
    """Queries (queries, d) for each of `images` (batch, ...), shared among devices as those; products need that."""
    x = jnp.broadcast_to(queries, (images.shape[0], *queries.shape))
    sharding = jax.typeof(images).sharding
    if not sharding.mesh.explicit_axes:
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0])))


def _residual(x: jax.Array, norm: nnx.LayerNorm, branch: Branch, pre_norm: bool) -> jax.Array:
    """A branch added to its input, with the norm before the branch or after the sum."""
    return x + branch(norm(x)) if pre_norm else norm(x + branch(x))


def named(run: RunFFN, name: str, tokens: jax.Array) -> Branch:
    """The FFN of that name, as the branch of a layer."""
    return lambda x: run(name, x, tokens)


class EncoderLayer(nnx.Module):
    """Self-attention over image tokens, then the FFN."""

    def __init__(self, config: DetrConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.self_attention = attention(config, config.encoder_heads, dtype, rngs)
        self.norm1 = layer_norm(config, dtype, rngs)
        self.ffn = FFN(config.d_model, config.encoder_ffn_dim, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(config, dtype, rngs)
        self.pre_norm = config.pre_norm

    def __call__(
        self, x: jax.Array, positions: jax.Array, mask: jax.Array, run: Branch, rows: jax.Array | None = None
    ) -> jax.Array:
        """New features of the tokens of `rows` (batch, k), of all for None; `run` computes the FFN."""
        of_rows = (lambda array: array) if rows is None else partial(take_tokens, rows=rows)
        values = self.norm1(x) if self.pre_norm else x

        def attend(own: jax.Array) -> jax.Array:
            return self.self_attention(own + of_rows(positions), values + positions, values, mask=mask)

        x = _residual(of_rows(x), self.norm1, attend, self.pre_norm)
        return _residual(x, self.norm2, run, self.pre_norm)


class DecoderLayer(nnx.Module):
    """Self-attention among queries, cross-attention to the image tokens, then the FFN."""

    def __init__(self, config: DetrConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.self_attention = attention(config, config.decoder_heads, dtype, rngs)
        self.norm1 = layer_norm(config, dtype, rngs)
        self.cross_attention = attention(config, config.decoder_heads, dtype, rngs)
        self.norm2 = layer_norm(config, dtype, rngs)
        self.ffn = FFN(config.d_model, config.decoder_ffn_dim, dtype=dtype, rngs=rngs)
        self.norm3 = layer_norm(config, dtype, rngs)
        self.pre_norm = config.pre_norm

    def __call__(
        self,
        x: jax.Array,
        queries: jax.Array,
        memory: jax.Array,
        located_memory: jax.Array,
        mask: jax.Array,
        run: Branch,
    ) -> jax.Array:
        """`run` computes the FFN."""

        def attend(x: jax.Array) -> jax.Array:
            located = x + queries
            return self.self_attention(located, located, x)

        def attend_to_image(x: jax.Array) -> jax.Array:
            return self.cross_attention(x + queries, located_memory, memory, mask=mask)

        x = _residual(x, self.norm1, attend, self.pre_norm)
        x = _residual(x, self.norm2, attend_to_image, self.pre_norm)
        return _residual(x, self.norm3, run, self.pre_norm)


class Transformer(nnx.Module):
    """Encoder and decoder, with the learned object queries."""

    decoder: nnx.List[Any]
    remat = False
    """Compute every layer again for its gradient, which saves the memory of what is inside. Not for traces."""

    def __init__(self, config: DetrConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.encoder = nnx.List([EncoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.encoder_layers)])
        self.encoder_norm = layer_norm(config, dtype, rngs) if config.pre_norm else None
        self.decoder = nnx.List([DecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.decoder_layers)])
        self.decoder_norm = layer_norm(config, dtype, rngs)
        self.queries = nnx.Param(jax.random.normal(rngs.params(), (config.queries, config.d_model)))
        self.dtype = dtype

    def encode(
        self, x: jax.Array, positions: jax.Array, tokens: jax.Array, run: RunFFN, kept: KeptTokens | None = None
    ) -> jax.Array:
        """Image tokens and their position encodings (batch, tokens, d) -> memory (batch, tokens, d).

        `tokens` (batch, tokens) bool is false for padding; `kept` are those that the layers update, None for all.
        """
        x = self.encoder_steps(x, positions, tokens, run, kept)[-1]
        return x if self.encoder_norm is None else self.encoder_norm(x)

    def encoder_steps(
        self, x: jax.Array, positions: jax.Array, tokens: jax.Array, run: RunFFN, kept: KeptTokens | None = None
    ) -> list[jax.Array]:
        """Features (batch, tokens, d) before the first and after each layer; arguments as of `encode`."""
        mask, steps = tokens[:, None, None, :], [x]
        for index in range(len(self.encoder)):
            update = partial(self._update, index, steps[-1], positions, mask, run)
            steps.append(update_layer(steps[-1], tokens, kept, index, update))
        return steps

    def _update(
        self,
        index: int,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        run: RunFFN,
        rows: jax.Array | None,
        counted: jax.Array,
    ) -> jax.Array:
        ffn = named(run, f"encoder.{index}", counted)
        call = partial(self.encoder[index], positions=positions, mask=mask, run=ffn, rows=rows)
        return (jax.checkpoint(call) if self.remat else call)(x)

    def decode(self, memory: jax.Array, positions: jax.Array, tokens: jax.Array, run: RunFFN) -> list[jax.Array]:
        """Memory -> features (batch, queries, d) of the object queries after each layer, normalised."""
        mask = tokens[:, None, None, :]
        queries = replicate_queries(self.queries[...].astype(self.dtype), memory)
        located_memory = memory + positions
        every_query = jnp.ones(queries.shape[:2], bool)
        x = replicate_queries(jnp.zeros(self.queries.shape, self.dtype), memory)
        outputs = []
        for index, layer in enumerate(self.decoder):
            branch = named(run, f"decoder.{index}", every_query)
            call = partial(layer, queries=queries, memory=memory, located_memory=located_memory, mask=mask, run=branch)
            x = (jax.checkpoint(call) if self.remat else call)(x)
            outputs.append(self.decoder_norm(x))
        return outputs
