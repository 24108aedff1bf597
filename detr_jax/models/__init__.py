"""The detector."""

from detr_jax.models.detr.config import PRESETS, BackboneConfig, DetrConfig, preset_config
from detr_jax.models.detr.modeling import DETR, DetrOutputs, ImageTokens
from detr_jax.models.ffn import FFNTrace
from detr_jax.models.selection import FFNWeights, LowRankFactors, OutputLayer, Partition, Selection, Selector, Selectors

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
    "OutputLayer",
    "Partition",
    "Selection",
    "Selector",
    "Selectors",
    "preset_config",
]
