"""Detectors: the protocol, the layers that they share, and the architectures."""

from detr_jax.models.base import Detector, FFNSpec, HasFFNs, Outputs
from detr_jax.models.detections import Detections, ImageDetections
from detr_jax.models.detr.config import PRESETS, DetrConfig, preset_config
from detr_jax.models.detr.modeling import DETR, ImageTokens
from detr_jax.models.detr.outputs import DetrOutputs
from detr_jax.models.ffn import FFNTrace
from detr_jax.models.preprocessing import Preprocessing
from detr_jax.models.registry import register
from detr_jax.models.resnet import BackboneConfig
from detr_jax.models.selection import (
    FFNWeights,
    LowRankFactors,
    OutputLayer,
    Partition,
    Permutations,
    PlanSelectors,
    Selection,
    Selector,
    Selectors,
)

register("detr", DetrConfig, DETR)

__all__ = [
    "DETR",
    "PRESETS",
    "BackboneConfig",
    "Detections",
    "Detector",
    "DetrConfig",
    "DetrOutputs",
    "FFNSpec",
    "FFNTrace",
    "FFNWeights",
    "HasFFNs",
    "ImageDetections",
    "ImageTokens",
    "LowRankFactors",
    "OutputLayer",
    "Outputs",
    "Partition",
    "Permutations",
    "PlanSelectors",
    "Preprocessing",
    "Selection",
    "Selector",
    "Selectors",
    "preset_config",
    "register",
]
