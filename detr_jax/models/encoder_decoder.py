"""Detectors with an FFN in every layer of an encoder of image tokens and of a decoder of object queries."""

import abc
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from detr_jax.models.base import Detector, FFNSpec
from detr_jax.models.ffn import FFN
from detr_jax.models.selection import Selectors
from detr_jax.models.token_selection import KeptTokens, kept_tokens

ENCODER = "encoder"
"""Name of the part whose layers may update some tokens only."""


class EncoderDecoder(Detector):
    """A detector whose `transformer` has layers `encoder` and `decoder`; its configuration is a `DetrConfig`."""

    transformer: Any
    token_parts = (ENCODER,)

    def kept_tokens(self, selectors: Selectors | None, features: Any, traced: bool) -> KeptTokens | None:
        """Image tokens that the encoder's layers update, of what `embed` returned; None for all of them."""
        selector: Any = (selectors or {}).get(ENCODER)
        if selector is None:
            return None
        return kept_tokens(selector, *self.encoder_inputs(features), self.config.encoder_layers, traced=traced)

    @abc.abstractmethod
    def encoder_inputs(self, features: Any) -> tuple[jax.Array, jax.Array, tuple[int, ...]]:
        """Of what `embed` returned: (batch, tokens, d), (batch, tokens) bool false for padding, tokens by level."""

    @abc.abstractmethod
    def encoder_steps(self, features: Any) -> list[jax.Array]:
        """Image tokens (batch, tokens, d) before the dense encoder's first layer and after each layer."""

    @abc.abstractmethod
    def record_attention(self, layer: Any, found: list[jax.Array]) -> None:
        """Makes the cross-attention of a decoder layer append the attention (batch, tokens) that image tokens get.

        It is summed over heads and object queries.
        """

    def decoder_attention(self, features: Any) -> jax.Array:
        """(batch, tokens) attention that image tokens get, summed over decoder layers, heads and object queries."""
        found: list[jax.Array] = []
        model = nnx.clone(self)
        for layer in model.transformer.decoder:
            model.record_attention(layer, found)
        model.transform(features)
        return jnp.stack(found).sum(0)

    def token_importance(self, features: Any, labels: Literal["attention", "update"]) -> jax.Array:
        """(batch, tokens) float32, what token gates look for in the dense detector, see `methods.TokenGates.labels`."""
        if labels == "attention":
            return self.decoder_attention(features)
        steps = [x.astype(jnp.float32) for x in self.encoder_steps(features)]
        changes = [jnp.linalg.norm(after - before, axis=-1) for before, after in itertools.pairwise(steps)]
        return jnp.stack(changes).sum(0)

    @property
    def ffns(self) -> dict[str, FFN]:
        layers: tuple[Any, ...] = (*self.transformer.encoder, *self.transformer.decoder)
        return dict(zip(self.config.ffn_names, (layer.ffn for layer in layers), strict=True))

    def ffn_specs(self) -> dict[str, FFNSpec]:
        config = self.config
        encoder = FFNSpec(config.d_model, config.encoder_ffn_dim, "image", grids=tuple(range(len(self.strides))))
        decoder = FFNSpec(config.d_model, config.decoder_ffn_dim, "query")
        specs = [encoder] * config.encoder_layers + [decoder] * config.decoder_layers
        return dict(zip(config.ffn_names, specs, strict=True))
