"""FFNs as arrays alone, without a detector around them."""

from dataclasses import dataclass

import jax

from detr_jax.models.ffn import FFNTrace, trace
from detr_jax.models.selection import FFNWeights, Selectors


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FFNInputs:
    """Inputs of FFNs that stand alone.

    Attributes:
        x: (images, tokens, d) inputs of each FFN by name.
        tokens: (images, tokens) bool by name, false for padding.
    """

    x: dict[str, jax.Array]
    tokens: dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StandaloneFFNs:
    """FFNs as arrays, each with inputs of its own; none sees what another one computes.

    Attributes:
        weights: of each FFN by name.
    """

    weights: dict[str, FFNWeights]

    def ffn_weights(self) -> dict[str, FFNWeights]:
        return self.weights

    def traces(self, batch: FFNInputs, selectors: Selectors) -> dict[str, FFNTrace]:
        return {
            name: trace(weights, batch.x[name], batch.tokens[name], selectors.get(name))
            for name, weights in self.weights.items()
        }
