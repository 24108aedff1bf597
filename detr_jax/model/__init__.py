"""The detector."""

from detr_jax.model.config import PRESETS, BackboneConfig, DetrConfig, preset_config
from detr_jax.model.detr import DETR, DetrOutputs, ImageTokens
from detr_jax.model.ffn import FFNTrace
from detr_jax.model.selection import FFNWeights, LowRankFactors, SecondLayer, Sections, Selection, Selector, Selectors

__all__ = [
    "DETR",
    "PRESETS",
    "BackboneConfig",
    "DetrConfig",
    "DetrOutputs",
    "FFNTrace",
    "FFNWeights",
    "ImageTokens",
    "LowRankFactors",
    "SecondLayer",
    "Sections",
    "Selection",
    "Selector",
    "Selectors",
    "preset_config",
]
