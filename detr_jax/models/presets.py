"""The configurations of published detectors, and of the embedded ones."""

from dataclasses import replace

from detr_jax.errors import InputError
from detr_jax.models.deformable_detr.config import DeformableDetrConfig
from detr_jax.models.detr.config import DetrConfig
from detr_jax.models.labels import SCENES_LABELS, TABLE_LABELS, TABLE_STRUCTURE_LABELS
from detr_jax.models.preprocessing import Preprocessing
from detr_jax.models.resnet import BackboneConfig

_R50 = BackboneConfig(depths=(3, 4, 6, 3))
_R101 = BackboneConfig(depths=(3, 4, 23, 3))
_R18 = BackboneConfig(depths=(2, 2, 2, 2), block="basic")
_TABLE_DETECTION = DetrConfig(
    _R18, TABLE_LABELS, queries=15, pre_norm=True, preprocessing=Preprocessing(shortest_side=800, longest_side=800)
)
_TABLE_STRUCTURE = replace(
    _TABLE_DETECTION,
    labels=TABLE_STRUCTURE_LABELS,
    queries=125,
    preprocessing=Preprocessing(shortest_side=1000, longest_side=1000),
)

_DEFORMABLE = DeformableDetrConfig(_R50)
_SINGLE_SCALE = replace(_DEFORMABLE, levels=1, backbone_levels=1)

PRESETS: dict[str, DetrConfig] = {
    "detr-r50": DetrConfig(_R50),
    "detr-r50-dc5": DetrConfig(replace(_R50, dilate_last=True)),
    "detr-r101": DetrConfig(_R101),
    "detr-r101-dc5": DetrConfig(replace(_R101, dilate_last=True)),
    "table-transformer-detection": _TABLE_DETECTION,
    "table-transformer-structure": _TABLE_STRUCTURE,
    "table-transformer-structure-v1.1": _TABLE_STRUCTURE,
    "deformable-detr-single-scale": _SINGLE_SCALE,
    "deformable-detr-single-scale-dc5": replace(_SINGLE_SCALE, backbone=replace(_R50, dilate_last=True)),
    "deformable-detr": _DEFORMABLE,
    "deformable-detr-with-box-refine": replace(_DEFORMABLE, refine=True),
    "deformable-detr-with-box-refine-two-stage": replace(_DEFORMABLE, refine=True, two_stage=True),
    "detr-tiny": DetrConfig(
        BackboneConfig(depths=(2, 2, 2), widths=(16, 32, 64), strides=(2, 2, 1), stem_width=16),
        labels=SCENES_LABELS,
        d_model=128,
        encoder_heads=4,
        decoder_heads=4,
        encoder_ffn_dim=1024,
        decoder_ffn_dim=1024,
        encoder_layers=3,
        decoder_layers=3,
        queries=20,
        preprocessing=Preprocessing(128, 213),
    ),
    "deformable-tiny": DeformableDetrConfig(
        BackboneConfig(depths=(2, 2, 2), widths=(16, 32, 64), strides=(2, 2, 2), stem_width=16),
        labels=SCENES_LABELS,
        d_model=64,
        encoder_heads=4,
        decoder_heads=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        encoder_layers=3,
        decoder_layers=3,
        queries=30,
        levels=3,
        encoder_points=2,
        decoder_points=2,
        refine=True,
        preprocessing=Preprocessing(256, 427),
    ),
}
"""The published detectors (Carion et al. 2020), of stride 32 or, with a dilated last stage (DC5), 16; Table Transformer
(Smock et al. 2022), whose longer side has the given length; Deformable DETR (Zhu et al. 2021); and the embedded ones
of generated scenes: 128x128 pixels, stride 16, 64 encoder tokens, and 256x256 pixels, strides 8, 16 and 32, 1,344
encoder tokens."""


def preset_config(name: str) -> DetrConfig:
    """The configuration of a preset; raises an InputError if there is none of that name."""
    if name not in PRESETS:
        raise InputError(f"no preset named {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
