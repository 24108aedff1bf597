"""DETR in JAX/Flax with its published weights, made sparse without retraining."""

from detr_jax.data.image_list import preprocess_images
from detr_jax.data.registry import open_dataset
from detr_jax.detection import detect
from detr_jax.evaluation.inspection import FFNActivity
from detr_jax.load import load, load_sparse, save
from detr_jax.methods import log_odds
from detr_jax.models import DETR, DetrConfig, DetrOutputs, preset_config
from detr_jax.models.detr.postprocess import ImageDetections
from detr_jax.models.parameters import fingerprint
from detr_jax.plan import Plan, load_plan, push_plan, save_plan
from detr_jax.sparse import SparseDETR

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
    "open_dataset",
    "preprocess_images",
    "preset_config",
    "push_plan",
    "save",
    "save_plan",
]
