"""What a DETR is made of, and the five presets."""

import dataclasses
import math
from dataclasses import dataclass

from detr_jax.errors import InputError
from detr_jax.models.labels import COCO_LABELS, SCENES_LABELS


@dataclass(frozen=True)
class BackboneConfig:
    """A bottleneck ResNet. Stage s has `depths[s]` blocks of inner width `widths[s]` and 4 times that outside."""

    depths: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512)
    strides: tuple[int, ...] = (1, 2, 2, 2)
    stem_width: int = 64
    dilate_last: bool = False
    """DC5: the last stage keeps its input's resolution; its blocks after the first are dilated by 2."""

    @property
    def features(self) -> int:
        return 4 * self.widths[-1]

    @property
    def stride(self) -> int:
        """Pixels between neighbouring features; the stem contributes 4."""
        return 4 * math.prod(self.strides[:-1] if self.dilate_last else self.strides)


@dataclass(frozen=True)
class DetrConfig:
    """Architecture, class names and preprocessing of one detector.

    `labels[i]` names class i; ids without a class (COCO has gaps) are empty strings. Like the official model,
    class ids are the category ids of the data set and "no object" comes last, so there are `len(labels) + 1` logits.
    """

    backbone: BackboneConfig
    labels: tuple[str, ...] = COCO_LABELS
    d_model: int = 256
    heads: int = 8
    ffn_features: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    queries: int = 100
    shortest_side: int = 800
    """Images are resized to this shorter side, in pixels ..."""
    longest_side: int = 1333
    """... unless the longer side would exceed this one."""

    @property
    def classes(self) -> int:
        return len(self.labels)

    @property
    def ffn_names(self) -> tuple[str, ...]:
        """Names of the FFNs in the order in which they run: encoder.0 ... decoder.0 ..."""
        return tuple(f"encoder.{i}" for i in range(self.encoder_layers)) + tuple(
            f"decoder.{i}" for i in range(self.decoder_layers)
        )


def detr_r50() -> DetrConfig:
    """Carion et al., "End-to-End Object Detection with Transformers", 2020: ResNet-50, stride 32."""
    return DetrConfig(BackboneConfig(depths=(3, 4, 6, 3)))


def detr_r50_dc5() -> DetrConfig:
    """ResNet-50 with a dilated last stage, stride 16."""
    return DetrConfig(BackboneConfig(depths=(3, 4, 6, 3), dilate_last=True))


def detr_r101() -> DetrConfig:
    """ResNet-101, stride 32."""
    return DetrConfig(BackboneConfig(depths=(3, 4, 23, 3)))


def detr_r101_dc5() -> DetrConfig:
    """ResNet-101 with a dilated last stage, stride 16."""
    return DetrConfig(BackboneConfig(depths=(3, 4, 23, 3), dilate_last=True))


def detr_tiny() -> DetrConfig:
    """The embedded detector of generated scenes: 128x128 pixels, stride 16, 64 encoder tokens."""
    return DetrConfig(
        BackboneConfig(depths=(2, 2, 2), widths=(16, 32, 64), strides=(2, 2, 1), stem_width=16),
        labels=SCENES_LABELS,
        d_model=128,
        heads=4,
        ffn_features=1024,
        encoder_layers=3,
        decoder_layers=3,
        queries=20,
        shortest_side=128,
        longest_side=213,
    )


PRESETS = {
    "detr-r50": detr_r50,
    "detr-r50-dc5": detr_r50_dc5,
    "detr-r101": detr_r101,
    "detr-r101-dc5": detr_r101_dc5,
    "detr-tiny": detr_tiny,
}


def preset_config(name: str) -> DetrConfig:
    """The configuration of a preset.

    Raises:
        ValueError: if there is no preset of that name.
    """
    if name not in PRESETS:
        raise InputError(f"no preset named {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]()


def config_to_json(config: DetrConfig) -> dict:
    """The configuration as JSON types."""
    return dataclasses.asdict(config)


def config_from_json(values: dict) -> DetrConfig:
    """Inverse of `config_to_json`.

    Raises:
        TypeError: if a field is missing or unknown.
    """
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    backbone = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.pop("backbone").items()
    }
    return DetrConfig(backbone=BackboneConfig(**backbone), **fields)
