"""DETR in JAX/Flax with its published weights, made sparse without retraining."""

from detr_jax.data.given_images import preprocess_images
from detr_jax.detection import detect
from detr_jax.load import load, load_sparse, save
from detr_jax.model import DETR, DetrConfig, DetrOutputs, preset_config
from detr_jax.model.parameters import fingerprint
from detr_jax.model.postprocess import ImageDetections
from detr_jax.sparse import SparseDETR
from detr_jax.sparsity import Plan, load_plan, push_plan, save_plan
from detr_jax.sparsity.inspection import FFNActivity
from detr_jax.sparsity.selectors import log_odds

__all__ = [
    "DETR",
    "DetrConfig",
    "DetrOutputs",
    "FFNActivity",
    "ImageDetections",
    "Plan",
    "SparseDETR",
    "detect",
    "fingerprint",
    "load",
    "load_plan",
    "load_sparse",
    "log_odds",
    "preprocess_images",
    "preset_config",
    "push_plan",
    "save",
    "save_plan",
]
