"""The names that published checkpoints give to our arrays, and the forms in which they hold them.

Three layouts: the official one, and the two of Hugging Face, whose backbone is named as in timm or as in transformers.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from detr_jax.models import BackboneConfig, DetrConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """How a checkpoint holds one of our arrays: its shape there, given ours, and the way from there to our shape."""

    shape: Callable[[Shape], Shape]
    convert: Callable[[np.ndarray, Shape], np.ndarray]


SAME = Form(lambda ours: ours, lambda array, ours: array)
MATRIX = Form(lambda ours: ours[::-1], lambda array, ours: array.T)
"""(out, in) -> (in, out)."""
POINTWISE = Form(lambda ours: (*ours[::-1], 1, 1), lambda array, ours: array[:, :, 0, 0].T)
"""A 1x1 convolution: (out, in, 1, 1) -> (in, out)."""
FILTER = Form(lambda ours: (ours[3], ours[2], ours[0], ours[1]), lambda array, ours: array.transpose(2, 3, 1, 0))
"""(out, in, height, width) -> (height, width, in, out)."""
TO_HEADS = Form(lambda ours: (ours[1] * ours[2], ours[0]), lambda array, ours: array.T.reshape(ours))
"""(heads * head_dim, in) -> (in, heads, head_dim)."""
TO_HEADS_BIAS = Form(lambda ours: (ours[0] * ours[1],), lambda array, ours: array.reshape(ours))
"""(heads * head_dim,) -> (heads, head_dim)."""
FROM_HEADS = Form(lambda ours: (ours[2], ours[0] * ours[1]), lambda array, ours: array.T.reshape(ours))
"""(out, heads * head_dim) -> (heads, head_dim, out)."""


class Place(NamedTuple):
    """Where one of our arrays is found. Places of one entry share it in equal parts, in order, along its first axis."""

    theirs: str
    ours: str
    form: Form


class ResNetNames(NamedTuple):
    """Names of a ResNet's parts, by default torchvision's, which timm kept; numbers go into the braces."""

    stem: tuple[str, str] = ("conv1", "bn1")  # a convolution and its norm
    block: str = "layer{}.{}"
    conv: tuple[str, str] = ("conv{}", "bn{}")
    downsample: tuple[str, str] = ("downsample.0", "downsample.1")
    first: int = 1  # number of the first stage, and of the first convolution of a block


_TORCHVISION = ResNetNames()
_TRANSFORMERS = ResNetNames(
    stem=("embedder.embedder.convolution", "embedder.embedder.normalization"),
    block="encoder.stages.{}.layers.{}",
    conv=("layer.{}.convolution", "layer.{}.normalization"),
    downsample=("shortcut.convolution", "shortcut.normalization"),
    first=0,
)


@dataclass(frozen=True)
class Layout:
    """One way to name the entries of a DETR, by default the official one."""

    name: str
    backbone: str
    resnet: ResNetNames = _TORCHVISION
    input_projection: str = "input_proj"
    transformer: str = "transformer"
    encoder_norms: tuple[str, ...] = ("norm1", "norm2")
    decoder_norms: tuple[str, ...] = ("norm1", "norm2", "norm3")
    ffn: tuple[str, str] = ("linear1", "linear2")
    cross_attention: str = "multihead_attn"
    attention: tuple[str, str] = ("in_proj_weight", "in_proj_bias")  # braces: query, key and value have their own entry
    decoder_norm: str = "transformer.decoder.norm"
    queries: str = "query_embed"
    class_head: str = "class_embed"
    box_head: str = "bbox_embed"

    def depths(self, names: Collection[str]) -> tuple[int, ...]:
        """Blocks of each stage of the backbone, at least one; empty where no name is that of a block."""
        pattern = re.escape(f"{self.backbone}.{self.resnet.block}.").replace(r"\{\}", r"(\d+)")
        blocks = [tuple(map(int, match.groups())) for name in names if (match := re.match(pattern, name))]
        stages = range(self.resnet.first, self.resnet.first + 4)
        return tuple(1 + max((b for s, b in blocks if s == stage), default=0) for stage in stages if blocks)

    def layers(self, part: str, names: Collection[str]) -> int:
        """Layers of the "encoder" or "decoder", at least one."""
        pattern = rf"{self.transformer}\.{part}\.layers\.(\d+)\."
        return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=0)

    def places(self, config: DetrConfig) -> Iterator[Place]:
        """Where a detector of a given configuration has each of its arrays."""
        yield from self._backbone(config.backbone)
        yield from _linear(self.input_projection, "input_projection", POINTWISE)
        own, cross = ("self_attn", "self_attention"), (self.cross_attention, "cross_attention")
        for i in range(config.encoder_layers):
            yield from self._layer(f"encoder.layers.{i}", f"transformer.encoder.{i}", [own], self.encoder_norms)
        for i in range(config.decoder_layers):
            yield from self._layer(f"decoder.layers.{i}", f"transformer.decoder.{i}", [own, cross], self.decoder_norms)
        yield from _linear(self.decoder_norm, "transformer.decoder_norm", SAME, "scale")
        yield Place(f"{self.queries}.weight", "transformer.queries", SAME)
        yield from _linear(self.class_head, "class_head")
        for index in range(3):
            yield from _linear(f"{self.box_head}.layers.{index}", f"box_head.layers.{index}")

    def _layer(
        self, theirs: str, ours: str, attentions: Sequence[tuple[str, str]], norms: Sequence[str]
    ) -> Iterator[Place]:
        theirs = f"{self.transformer}.{theirs}"
        for name, our_name in attentions:
            weight, bias = (f"{theirs}.{name}.{entry}" for entry in self.attention)
            for part in ("query", "key", "value"):
                yield Place(weight.format(part[0]), f"{ours}.{our_name}.{part}.kernel", TO_HEADS)
                yield Place(bias.format(part[0]), f"{ours}.{our_name}.{part}.bias", TO_HEADS_BIAS)
            yield from _linear(f"{theirs}.{name}.out_proj", f"{ours}.{our_name}.out", FROM_HEADS)
        for index, norm in enumerate(norms, 1):
            yield from _linear(f"{theirs}.{norm}", f"{ours}.norm{index}", SAME, "scale")
        for linear, suffix, form in zip(self.ffn, ("in", "out"), (SAME, MATRIX), strict=True):
            yield Place(f"{theirs}.{linear}.weight", f"{ours}.ffn.w_{suffix}", form)
            yield Place(f"{theirs}.{linear}.bias", f"{ours}.ffn.b_{suffix}", SAME)

    def _backbone(self, config: BackboneConfig) -> Iterator[Place]:
        names, first = self.resnet, self.resnet.first
        yield from _conv_norm(self.backbone, names.stem, "backbone.stem")
        for stage, depth in enumerate(config.depths):
            for block in range(depth):
                theirs = f"{self.backbone}.{names.block.format(first + stage, block)}"
                ours = f"backbone.stages.{stage}.{block}"
                for index in range(3):
                    conv, norm = (name.format(first + index) for name in names.conv)
                    yield from _conv_norm(theirs, (conv, norm), f"{ours}.conv{index + 1}")
                if block == 0:
                    yield from _conv_norm(theirs, names.downsample, f"{ours}.downsample")


_HUGGING_FACE: dict[str, Any] = {
    "backbone": "model.backbone.conv_encoder.model",
    "input_projection": "model.input_projection",
    "transformer": "model",
    "encoder_norms": ("self_attn_layer_norm", "final_layer_norm"),
    "decoder_norms": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    "ffn": ("fc1", "fc2"),
    "cross_attention": "encoder_attn",
    "attention": ("{}_proj.weight", "{}_proj.bias"),
    "decoder_norm": "model.decoder.layernorm",
    "queries": "model.query_position_embeddings",
    "class_head": "class_labels_classifier",
    "box_head": "bbox_predictor",
}
LAYOUTS = (
    Layout("official DETR", "backbone.0.body"),
    Layout("Hugging Face DETR, timm backbone", **_HUGGING_FACE),
    Layout("Hugging Face DETR, transformers backbone", resnet=_TRANSFORMERS, **_HUGGING_FACE),
)


def _linear(theirs: str, ours: str, form: Form = MATRIX, weight: str = "kernel") -> Iterator[Place]:
    yield Place(f"{theirs}.weight", f"{ours}.{weight}", form)
    yield Place(f"{theirs}.bias", f"{ours}.bias", SAME)


def _conv_norm(theirs: str, pair: tuple[str, str], ours: str) -> Iterator[Place]:
    conv, norm = pair
    yield Place(f"{theirs}.{conv}.weight", f"{ours}.conv.kernel", FILTER)
    for entry, name in (("weight", "scale"), ("bias", "bias"), ("running_mean", "mean"), ("running_var", "var")):
        yield Place(f"{theirs}.{norm}.{entry}", f"{ours}.norm.{name}", SAME)
