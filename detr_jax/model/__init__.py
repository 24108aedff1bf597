"""The detector."""

from detr_jax.model.config import PRESETS, BackboneConfig, DetrConfig, preset_config
from detr_jax.model.detr import DETR, DetrOutputs
from detr_jax.model.ffn import FFNTrace, FFNWeights, Selector, Selectors

__all__ = [
    "DETR",
    "PRESETS",
    "BackboneConfig",
    "DetrConfig",
    "DetrOutputs",
    "FFNTrace",
    "FFNWeights",
    "Selector",
    "Selectors",
    "preset_config",
]
