"""Configuration of a DETR."""

from dataclasses import dataclass, field, replace
from typing import Any

from detr_jax.models.labels import COCO_LABELS
from detr_jax.models.preprocessing import Preprocessing
from detr_jax.models.registry import dataclass_from_json
from detr_jax.models.resnet import BackboneConfig


@dataclass(frozen=True)
class DetrConfig:
    """Architecture, class names and preprocessing of one detector.

    `labels[i]` names class i; ids without a class (COCO has gaps) are empty strings. Like the official model,
    class ids are the category ids of the data set and "no object" comes last, so there are `len(labels) + 1` logits.
    """

    backbone: BackboneConfig
    labels: tuple[str, ...] = COCO_LABELS
    d_model: int = 256
    encoder_heads: int = 8
    decoder_heads: int = 8
    encoder_ffn_dim: int = 2048
    """Hidden neurons of each encoder FFN."""
    decoder_ffn_dim: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    queries: int = 100
    pre_norm: bool = False
    """Layer norms before attention and FFNs, and one after the encoder, as in Table Transformer, instead of after."""
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    """Its stride is always the backbone's."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "preprocessing", replace(self.preprocessing, stride=self.backbone.stride))

    @property
    def classes(self) -> int:
        return len(self.labels)

    @property
    def logits(self) -> int:
        return self.classes + 1

    @property
    def ffn_names(self) -> tuple[str, ...]:
        """Names of the FFNs in the order in which they run: encoder.0 ... decoder.0 ..."""
        parts = (("encoder", self.encoder_layers), ("decoder", self.decoder_layers))
        return tuple(f"{part}.{i}" for part, layers in parts for i in range(layers))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "DetrConfig":
        """From JSON types; files of version 1 had one FFN size, one number of heads, and two facts about pixels."""
        values = dict(values)
        for old, new in (("heads", "heads"), ("ffn_features", "ffn_dim")):
            if old in values:
                values |= dict.fromkeys((f"encoder_{new}", f"decoder_{new}"), values.pop(old))
        if sides := {side: values.pop(side) for side in ("shortest_side", "longest_side") if side in values}:
            values["preprocessing"] = sides
        return dataclass_from_json(cls, values)
