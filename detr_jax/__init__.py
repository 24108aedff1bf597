"""DETR in JAX/Flax with its published weights, made sparse without retraining."""

import importlib
from typing import TYPE_CHECKING, Any

from detr_jax import methods
from detr_jax.data.image_list import preprocess_images
from detr_jax.data.registry import open_dataset
from detr_jax.detection import detect
from detr_jax.evaluation.inspection import FFNActivity
from detr_jax.export import export
from detr_jax.load import load, load_sparse, save
from detr_jax.methods import log_odds
from detr_jax.models import DETR, DetrConfig, DetrOutputs, preset_config
from detr_jax.models.detections import ImageDetections
from detr_jax.models.parameters import fingerprint
from detr_jax.plan import Plan, load_plan, push_plan, save_plan
from detr_jax.sparse import SparseDETR
from detr_jax.sparsify import gate_tokens, sparsify

if TYPE_CHECKING:
    from detr_jax.evaluation.evaluate import Scores, evaluate
    from detr_jax.training.budgets import Density, MaxDivergence, Recall, Threshold
    from detr_jax.training.fit import FitOptions

__all__ = [
    "DETR",
    "Density",
    "DetrConfig",
    "DetrOutputs",
    "FFNActivity",
    "FitOptions",
    "ImageDetections",
    "MaxDivergence",
    "Plan",
    "Recall",
    "Scores",
    "SparseDETR",
    "Threshold",
    "detect",
    "evaluate",
    "export",
    "fingerprint",
    "gate_tokens",
    "load",
    "load_plan",
    "load_sparse",
    "log_odds",
    "methods",
    "open_dataset",
    "preprocess_images",
    "preset_config",
    "push_plan",
    "save",
    "save_plan",
    "sparsify",
]

_IMPORTED_WHEN_USED = {
    **dict.fromkeys(("Scores", "evaluate"), "evaluation.evaluate"),
    **dict.fromkeys(("Density", "MaxDivergence", "Recall", "Threshold"), "training.budgets"),
    "FitOptions": "training.fit",
}
"""Module of names whose imports take long, so that `import detr_jax` stays quick."""


def __getattr__(name: str) -> Any:
    if name not in _IMPORTED_WHEN_USED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_IMPORTED_WHEN_USED[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _IMPORTED_WHEN_USED.keys())
