"""DETR in JAX/Flax with its published weights, made sparse without retraining."""

from detr_jax.model import DETR, DetrConfig, DetrOutputs, preset_config

__all__ = ["DETR", "DetrConfig", "DetrOutputs", "preset_config"]
