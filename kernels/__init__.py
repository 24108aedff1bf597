"""The FFN operation. Knows arrays, not detectors."""

from detr_jax.kernels.reference import expand_groups, ffn, hidden_activations

__all__ = ["expand_groups", "ffn", "hidden_activations"]
