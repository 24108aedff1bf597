"""Detectors: the protocol, the layers that they share, and the architectures."""

# ruff: noqa: F401 - everything here is public

from detr_jax.models.base import Detector, FFNSpec, HasFFNs, Outputs
from detr_jax.models.conditional_detr.config import ConditionalDetrConfig
from detr_jax.models.conditional_detr.modeling import ConditionalDETR
from detr_jax.models.deformable_detr.config import DeformableDetrConfig
from detr_jax.models.deformable_detr.modeling import DeformableDETR
from detr_jax.models.detections import Detections
from detr_jax.models.detr.config import DetrConfig
from detr_jax.models.detr.modeling import DETR, ImageTokens
from detr_jax.models.detr.outputs import DetrOutputs
from detr_jax.models.ffn import FFNTrace
from detr_jax.models.preprocessing import Preprocessing
from detr_jax.models.presets import PRESETS, preset_config
from detr_jax.models.registry import register
from detr_jax.models.resnet import BackboneConfig
from detr_jax.models.selection import (
    FFNWeights,
    LowRankFactors,
    OutputLayer,
    Partition,
    Permutations,
    PlanSelectors,
    Routed,
    Selection,
    Selector,
    Selectors,
)

register("detr", DetrConfig, DETR)
register("conditional_detr", ConditionalDetrConfig, ConditionalDETR)
register("deformable_detr", DeformableDetrConfig, DeformableDETR)
