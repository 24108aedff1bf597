"""The gate of MGS, Micro-Gated Sparsification: one linear layer and a sigmoid per FFN (arXiv 2510.09380)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from detr_jax.model import DetrConfig
from detr_jax.sparsity.grouping import group_count

PAPER_GROUP_SIZE = 8
PAPER_THRESHOLD = 0.5


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinearGate:
    """Predicts which groups of an FFN's hidden neurons fire, from the FFN's own input.

    Attributes:
        kernel: (d, G) float32.
        bias: (G,) float32.
        threshold: () float32, groups of a lower probability are skipped.
    """

    kernel: jax.Array
    bias: jax.Array
    threshold: jax.Array

    def logits(self, x: jax.Array) -> jax.Array:
        """(..., d) -> (..., G) log-odds that the group fires."""
        return x.astype(jnp.float32) @ self.kernel + self.bias

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., d) -> (..., G) bool, the groups to compute."""
        return jax.nn.sigmoid(self.logits(x)) >= self.threshold


def initial_gates(config: DetrConfig, group_size: int) -> dict[str, LinearGate]:
    """Gates that say one half to everything, one for every FFN.

    Their loss is convex, so zeros are as good a start as any.
    """
    groups = group_count(config.ffn_features, group_size)
    return {
        name: LinearGate(
            kernel=jnp.zeros((config.d_model, groups)),
            bias=jnp.zeros(groups),
            threshold=jnp.float32(PAPER_THRESHOLD),
        )
        for name in config.ffn_names
    }


def with_thresholds(gates: dict[str, LinearGate], thresholds: dict[str, float]) -> dict[str, LinearGate]:
    """The same gates with other thresholds, probabilities from 0 to 1.

    Raises:
        ValueError: if a threshold is no probability.
    """
    for name, threshold in thresholds.items():
        if not 0 <= threshold <= 1:
            raise ValueError(f"the threshold of {name} must be a probability, not {threshold}")
    return {name: LinearGate(gate.kernel, gate.bias, jnp.float32(thresholds[name])) for name, gate in gates.items()}
