"""The names that published checkpoints give to our arrays, and the forms in which they hold them.

Three layouts: the official one, and the two of Hugging Face, whose backbone is named as in timm or as in transformers.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

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


@dataclass(frozen=True)
class Layout:
    """One way to name the entries of a DETR, and which of them tell its size.

    Attributes:
        name: what people call it.
        stages, encoder, decoder: match the names of a stage's blocks (stage and block), and of the layers, by number.
        places: where a detector of a given configuration has each of its arrays.
    """

    name: str
    stages: re.Pattern
    encoder: re.Pattern
    decoder: re.Pattern
    places: Callable[[DetrConfig], Iterator[Place]]


def _linear(theirs: str, ours: str, form: Form = MATRIX) -> Iterator[Place]:
    yield Place(f"{theirs}.weight", f"{ours}.kernel", form)
    yield Place(f"{theirs}.bias", f"{ours}.bias", SAME)


def _layer_norm(theirs: str, ours: str) -> Iterator[Place]:
    yield Place(f"{theirs}.weight", f"{ours}.scale", SAME)
    yield Place(f"{theirs}.bias", f"{ours}.bias", SAME)


def _conv_norm(conv: str, norm: str, ours: str) -> Iterator[Place]:
    yield Place(f"{conv}.weight", f"{ours}.conv.kernel", FILTER)
    for theirs, name in (("weight", "scale"), ("bias", "bias"), ("running_mean", "mean"), ("running_var", "var")):
        yield Place(f"{norm}.{theirs}", f"{ours}.norm.{name}", SAME)


def _ffn(first: str, second: str, ours: str) -> Iterator[Place]:
    yield Place(f"{first}.weight", f"{ours}.w_in", SAME)
    yield Place(f"{first}.bias", f"{ours}.b_in", SAME)
    yield Place(f"{second}.weight", f"{ours}.w_out", MATRIX)
    yield Place(f"{second}.bias", f"{ours}.b_out", SAME)


def _fused_attention(theirs: str, ours: str) -> Iterator[Place]:
    for name in ("query", "key", "value"):
        yield Place(f"{theirs}.in_proj_weight", f"{ours}.{name}.kernel", TO_HEADS)
        yield Place(f"{theirs}.in_proj_bias", f"{ours}.{name}.bias", TO_HEADS_BIAS)
    yield from _linear(f"{theirs}.out_proj", f"{ours}.out", FROM_HEADS)


def _attention(theirs: str, ours: str) -> Iterator[Place]:
    for name in ("query", "key", "value"):
        yield Place(f"{theirs}.{name[0]}_proj.weight", f"{ours}.{name}.kernel", TO_HEADS)
        yield Place(f"{theirs}.{name[0]}_proj.bias", f"{ours}.{name}.bias", TO_HEADS_BIAS)
    yield from _linear(f"{theirs}.out_proj", f"{ours}.out", FROM_HEADS)


def _torchvision_resnet(config: BackboneConfig, prefix: str) -> Iterator[Place]:
    """The names of torchvision, which timm kept."""
    yield from _conv_norm(f"{prefix}.conv1", f"{prefix}.bn1", "backbone.stem")
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            theirs, ours = f"{prefix}.layer{stage + 1}.{block}", f"backbone.stages.{stage}.{block}"
            for conv in (1, 2, 3):
                yield from _conv_norm(f"{theirs}.conv{conv}", f"{theirs}.bn{conv}", f"{ours}.conv{conv}")
            if block == 0:
                yield from _conv_norm(f"{theirs}.downsample.0", f"{theirs}.downsample.1", f"{ours}.downsample")


def _transformers_resnet(config: BackboneConfig, prefix: str) -> Iterator[Place]:
    def conv_norm(theirs: str, ours: str) -> Iterator[Place]:
        return _conv_norm(f"{theirs}.convolution", f"{theirs}.normalization", ours)

    yield from conv_norm(f"{prefix}.embedder.embedder", "backbone.stem")
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            theirs = f"{prefix}.encoder.stages.{stage}.layers.{block}"
            ours = f"backbone.stages.{stage}.{block}"
            for conv in (1, 2, 3):
                yield from conv_norm(f"{theirs}.layer.{conv - 1}", f"{ours}.conv{conv}")
            if block == 0:
                yield from conv_norm(f"{theirs}.shortcut", f"{ours}.downsample")


def _official(config: DetrConfig) -> Iterator[Place]:
    yield from _torchvision_resnet(config.backbone, "backbone.0.body")
    yield from _linear("input_proj", "input_projection", POINTWISE)
    for index in range(config.encoder_layers):
        theirs, ours = f"transformer.encoder.layers.{index}", f"transformer.encoder.{index}"
        yield from _fused_attention(f"{theirs}.self_attn", f"{ours}.self_attention")
        yield from _layer_norm(f"{theirs}.norm1", f"{ours}.norm1")
        yield from _ffn(f"{theirs}.linear1", f"{theirs}.linear2", f"{ours}.ffn")
        yield from _layer_norm(f"{theirs}.norm2", f"{ours}.norm2")
    for index in range(config.decoder_layers):
        theirs, ours = f"transformer.decoder.layers.{index}", f"transformer.decoder.{index}"
        yield from _fused_attention(f"{theirs}.self_attn", f"{ours}.self_attention")
        yield from _layer_norm(f"{theirs}.norm1", f"{ours}.norm1")
        yield from _fused_attention(f"{theirs}.multihead_attn", f"{ours}.cross_attention")
        yield from _layer_norm(f"{theirs}.norm2", f"{ours}.norm2")
        yield from _ffn(f"{theirs}.linear1", f"{theirs}.linear2", f"{ours}.ffn")
        yield from _layer_norm(f"{theirs}.norm3", f"{ours}.norm3")
    yield from _layer_norm("transformer.decoder.norm", "transformer.decoder_norm")
    yield Place("query_embed.weight", "transformer.queries", SAME)
    yield from _linear("class_embed", "class_head")
    for index in range(3):
        yield from _linear(f"bbox_embed.layers.{index}", f"box_head.layers.{index}")


def _hugging_face(config: DetrConfig) -> Iterator[Place]:
    """Everything but the backbone."""
    yield from _linear("model.input_projection", "input_projection", POINTWISE)
    for index in range(config.encoder_layers):
        theirs, ours = f"model.encoder.layers.{index}", f"transformer.encoder.{index}"
        yield from _attention(f"{theirs}.self_attn", f"{ours}.self_attention")
        yield from _layer_norm(f"{theirs}.self_attn_layer_norm", f"{ours}.norm1")
        yield from _ffn(f"{theirs}.fc1", f"{theirs}.fc2", f"{ours}.ffn")
        yield from _layer_norm(f"{theirs}.final_layer_norm", f"{ours}.norm2")
    for index in range(config.decoder_layers):
        theirs, ours = f"model.decoder.layers.{index}", f"transformer.decoder.{index}"
        yield from _attention(f"{theirs}.self_attn", f"{ours}.self_attention")
        yield from _layer_norm(f"{theirs}.self_attn_layer_norm", f"{ours}.norm1")
        yield from _attention(f"{theirs}.encoder_attn", f"{ours}.cross_attention")
        yield from _layer_norm(f"{theirs}.encoder_attn_layer_norm", f"{ours}.norm2")
        yield from _ffn(f"{theirs}.fc1", f"{theirs}.fc2", f"{ours}.ffn")
        yield from _layer_norm(f"{theirs}.final_layer_norm", f"{ours}.norm3")
    yield from _layer_norm("model.decoder.layernorm", "transformer.decoder_norm")
    yield Place("model.query_position_embeddings.weight", "transformer.queries", SAME)
    yield from _linear("class_labels_classifier", "class_head")
    for index in range(3):
        yield from _linear(f"bbox_predictor.layers.{index}", f"box_head.layers.{index}")


HUGGING_FACE_BACKBONE = "model.backbone.conv_encoder.model"


def _hugging_face_timm(config: DetrConfig) -> Iterator[Place]:
    yield from _torchvision_resnet(config.backbone, HUGGING_FACE_BACKBONE)
    yield from _hugging_face(config)


def _hugging_face_native(config: DetrConfig) -> Iterator[Place]:
    yield from _transformers_resnet(config.backbone, HUGGING_FACE_BACKBONE)
    yield from _hugging_face(config)


_HUGGING_FACE_SIZES = {
    "encoder": re.compile(r"model\.encoder\.layers\.(\d+)\."),
    "decoder": re.compile(r"model\.decoder\.layers\.(\d+)\."),
}

LAYOUTS = (
    Layout(
        name="official DETR",
        stages=re.compile(r"backbone\.0\.body\.layer(\d+)\.(\d+)\."),
        encoder=re.compile(r"transformer\.encoder\.layers\.(\d+)\."),
        decoder=re.compile(r"transformer\.decoder\.layers\.(\d+)\."),
        places=_official,
    ),
    Layout(
        name="Hugging Face DETR, timm backbone",
        stages=re.compile(r"model\.backbone\.conv_encoder\.model\.layer(\d+)\.(\d+)\."),
        places=_hugging_face_timm,
        **_HUGGING_FACE_SIZES,
    ),
    Layout(
        name="Hugging Face DETR, transformers backbone",
        stages=re.compile(r"model\.backbone\.conv_encoder\.model\.encoder\.stages\.(\d+)\.layers\.(\d+)\."),
        places=_hugging_face_native,
        **_HUGGING_FACE_SIZES,
    ),
)
