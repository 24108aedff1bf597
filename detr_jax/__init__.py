"""DETR in JAX/Flax with its published weights, made sparse without retraining."""

from detr_jax.load import load, save
from detr_jax.model import DETR, DetrConfig, DetrOutputs, preset_config
from detr_jax.model.parameters import fingerprint

__all__ = ["DETR", "DetrConfig", "DetrOutputs", "fingerprint", "load", "preset_config", "save"]
