"""The FFN operation, and the sampling of Deformable DETR. Knows arrays, not detectors."""

from detr_jax.kernels.backend import FFNWeights
from detr_jax.kernels.block_masks import (
    BlockLists,
    any_per_tile,
    indices_to_mask,
    mask_to_indices,
    pad_tokens,
    repeat_per_tile,
)
from detr_jax.kernels.dispatch import IMPLEMENTATIONS, Dispatch, UnavailableError
from detr_jax.kernels.experts import Experts
from detr_jax.kernels.operation import Execution, block_sparse_ffn, sparse_ffn
from detr_jax.kernels.reference import expand_groups, ffn, hidden_activations
from detr_jax.kernels.routed import routed_ffn
from detr_jax.kernels.sampling import multi_scale_sampling
from detr_jax.kernels.token_sorting import signature_order

__all__ = [
    "IMPLEMENTATIONS",
    "BlockLists",
    "Dispatch",
    "Execution",
    "Experts",
    "FFNWeights",
    "UnavailableError",
    "any_per_tile",
    "block_sparse_ffn",
    "expand_groups",
    "ffn",
    "hidden_activations",
    "indices_to_mask",
    "mask_to_indices",
    "multi_scale_sampling",
    "pad_tokens",
    "repeat_per_tile",
    "routed_ffn",
    "signature_order",
    "sparse_ffn",
]
