"""The FFN operation. Knows arrays, not detectors."""

from detr_jax.kernels.blocks import BlockLists, lists_of, map_of, of_tiles, pad_tokens, tiles_needing
from detr_jax.kernels.dispatch import IMPLEMENTATIONS, UnavailableError
from detr_jax.kernels.operation import Execution, block_sparse_ffn, sparse_ffn
from detr_jax.kernels.ordering import signature_order
from detr_jax.kernels.reference import FFNWeights, expand_groups, ffn, hidden_activations

__all__ = [
    "IMPLEMENTATIONS",
    "BlockLists",
    "Execution",
    "FFNWeights",
    "UnavailableError",
    "block_sparse_ffn",
    "expand_groups",
    "ffn",
    "hidden_activations",
    "lists_of",
    "map_of",
    "of_tiles",
    "pad_tokens",
    "signature_order",
    "sparse_ffn",
    "tiles_needing",
]
