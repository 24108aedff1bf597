"""The names that published checkpoints give to our arrays, and the forms in which they hold them.

Three layouts: the official one, and the two of Hugging Face, whose backbone is named as in timm or as in transformers.
The latter also come with the module names of transformers 5, and without the "model." of the part before the heads.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from detr_jax.models import BackboneConfig, ConditionalDetrConfig, DetrConfig

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


_CONDITIONAL = {
    "query_content": ("qcontent_proj", "q_content_proj"),
    "query_position": ("qpos_proj", "q_pos_proj"),
    "query_sine": ("qpos_sine_proj", "q_pos_sine_proj"),
    "key_content": ("kcontent_proj", "k_content_proj"),
    "key_position": ("kpos_proj", "k_pos_proj"),
    "value": ("v_proj", "v_proj"),
}
"""Our names of the projections of Conditional DETR's decoder, and theirs."""


@dataclass(frozen=True)
class Layout:
    """One way to name the entries of a DETR, by default the official one."""

    name: str
    backbone: str
    resnet: ResNetNames = _TORCHVISION
    input_projection: str = "input_proj"
    level_projection: str = "input_proj"  # of Deformable DETR
    transformer: str = "transformer."
    encoder_norms: tuple[str, ...] = ("norm1", "norm2")
    decoder_norms: tuple[str, ...] = ("norm1", "norm2", "norm3")
    ffn: tuple[str, str] = ("linear1", "linear2")
    deformable_decoder_norms: tuple[str, ...] = ("norm2", "norm1", "norm3")  # in the order in which they run
    cross_attention: str = "multihead_attn"
    conditional_attention: str = "cross_attn"  # of Conditional and Deformable DETR
    attention: tuple[str, str] = ("in_proj_weight", "in_proj_bias")  # braces: query, key and value have their own entry
    out_projection: str = "out_proj"
    norm: str = "norm"  # after the decoder and, where layers are pre-norm, after the encoder
    queries: str = "query_embed"
    class_head: str = "class_embed"
    box_head: str = "bbox_embed"

    def depths(self, names: Collection[str]) -> tuple[int, ...]:
        """Blocks of each stage of the backbone, at least one; empty where no name is that of a block."""
        pattern = re.escape(f"{self.backbone}.{self.resnet.block}.").replace(r"\{\}", r"(\d+)")
        blocks = [tuple(map(int, match.groups())) for name in names if (match := re.match(pattern, name))]
        stages = range(self.resnet.first, self.resnet.first + 4)
        return tuple(1 + max((b for s, b in blocks if s == stage), default=0) for stage in stages if blocks)

    def block(self, names: Collection[str]) -> Literal["bottleneck", "basic"]:
        """Kind of the backbone's blocks, told by a third convolution."""
        first, conv = self.resnet.first, self.resnet.conv[0]
        third = f"{self.backbone}.{self.resnet.block.format(first, 0)}.{conv.format(first + 2)}.weight"
        return "bottleneck" if third in names else "basic"

    @property
    def reference_head(self) -> str:
        """Name of the head of the reference points, which only Conditional DETR has."""
        return f"{self.transformer}decoder.ref_point_head.layers.0"

    @property
    def encoder_norm(self) -> str:
        """Name of the norm after the encoder, which only detectors with pre-norm layers have."""
        return f"{self.transformer}encoder.{self.norm}"

    def layers(self, part: str, names: Collection[str]) -> int:
        """Layers of the "encoder" or "decoder", at least one."""
        pattern = rf"{re.escape(self.transformer)}{part}\.layers\.(\d+)\."
        return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=0)

    def places(self, config: DetrConfig) -> Iterator[Place]:
        """Where a detector of a given configuration has each of its arrays."""
        yield from self.backbone_places(config.backbone)
        yield from linear_places(self.input_projection, "input_projection", POINTWISE)
        own, cross = ("self_attn", "self_attention"), (self.cross_attention, "cross_attention")
        for i in range(config.encoder_layers):
            yield from self.layer_places(f"encoder.layers.{i}", f"transformer.encoder.{i}", [own], self.encoder_norms)
        conditional = isinstance(config, ConditionalDetrConfig)
        for i in range(config.decoder_layers):
            theirs, ours = f"decoder.layers.{i}", f"transformer.decoder.{i}"
            yield from self.layer_places(theirs, ours, [] if conditional else [own, cross], self.decoder_norms)
            if conditional:
                yield from self._conditional_attention(f"{self.transformer}{theirs}", ours, first=i == 0)
        if conditional:
            for theirs, ours in (("query_scale", "query_scale"), ("ref_point_head", "reference_head")):
                for index in range(2):
                    name = f"{self.transformer}decoder.{theirs}.layers.{index}"
                    yield from linear_places(name, f"transformer.{ours}.layers.{index}")
        if config.pre_norm:
            yield from linear_places(self.encoder_norm, "transformer.encoder_norm", SAME, "scale")
        yield from linear_places(f"{self.transformer}decoder.{self.norm}", "transformer.decoder_norm", SAME, "scale")
        yield Place(f"{self.queries}.weight", "transformer.queries", SAME)
        yield from linear_places(self.class_head, "class_head")
        for index in range(3):
            yield from linear_places(f"{self.box_head}.layers.{index}", f"box_head.layers.{index}")

    def _conditional_attention(self, theirs: str, ours: str, first: bool) -> Iterator[Place]:
        """Linear layers that are named by attention and part or, as modules of transformers 5, lie in the attention."""
        modules = self.out_projection == "o_proj"
        own = ("query_content", "query_position", "key_content", "key_position", "value")
        cross = (*own, "query_sine") if first else (*own[:1], *own[2:], "query_sine")
        for attention, prefix, our_name, parts in (
            ("self_attn", "sa", "self_attention", own),
            (self.conditional_attention, "ca", "cross_attention", cross),
        ):
            for part in parts:
                flat, module = _CONDITIONAL[part]
                name = f"{theirs}.{attention}.{module}" if modules else f"{theirs}.{prefix}_{flat}"
                yield from linear_places(name, f"{ours}.{our_name}.{part}")
            yield from linear_places(f"{theirs}.{attention}.{self.out_projection}", f"{ours}.{our_name}.out")

    def layer_places(
        self, theirs: str, ours: str, attentions: Sequence[tuple[str, str]], norms: Sequence[str]
    ) -> Iterator[Place]:
        theirs = f"{self.transformer}{theirs}"
        for name, our_name in attentions:
            weight, bias = (f"{theirs}.{name}.{entry}" for entry in self.attention)
            for part in ("query", "key", "value"):
                yield Place(weight.format(part[0]), f"{ours}.{our_name}.{part}.kernel", TO_HEADS)
                yield Place(bias.format(part[0]), f"{ours}.{our_name}.{part}.bias", TO_HEADS_BIAS)
            yield from linear_places(f"{theirs}.{name}.{self.out_projection}", f"{ours}.{our_name}.out", FROM_HEADS)
        for index, norm in enumerate(norms, 1):
            yield from linear_places(f"{theirs}.{norm}", f"{ours}.norm{index}", SAME, "scale")
        for linear, suffix, form in zip(self.ffn, ("in", "out"), (SAME, MATRIX), strict=True):
            yield Place(f"{theirs}.{linear}.weight", f"{ours}.ffn.w_{suffix}", form)
            yield Place(f"{theirs}.{linear}.bias", f"{ours}.ffn.b_{suffix}", SAME)

    def backbone_places(self, config: BackboneConfig) -> Iterator[Place]:
        names, first = self.resnet, self.resnet.first
        yield from _conv_norm(self.backbone, names.stem, "backbone.stem")
        for stage, depth in enumerate(config.depths):
            for block in range(depth):
                theirs = f"{self.backbone}.{names.block.format(first + stage, block)}"
                ours = f"backbone.stages.{stage}.{block}"
                for index in range(3 if config.block == "bottleneck" else 2):
                    conv, norm = (name.format(first + index) for name in names.conv)
                    yield from _conv_norm(theirs, (conv, norm), f"{ours}.conv{index + 1}")
                if block == 0 and config.projects(stage):
                    yield from _conv_norm(theirs, names.downsample, f"{ours}.downsample")


def _hugging_face(resnet: ResNetNames, base: str, backbone: str) -> Layout:
    decoder_norms = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
    return Layout(
        f"Hugging Face DETR, {'timm' if resnet is _TORCHVISION else 'transformers'} backbone",
        f"{base}{backbone}",
        resnet,
        input_projection=f"{base}input_projection",
        level_projection=f"{base}input_proj",
        transformer=base,
        encoder_norms=("self_attn_layer_norm", "final_layer_norm"),
        decoder_norms=decoder_norms,
        deformable_decoder_norms=decoder_norms,
        ffn=("fc1", "fc2"),
        cross_attention="encoder_attn",
        conditional_attention="encoder_attn",
        attention=("{}_proj.weight", "{}_proj.bias"),
        norm="layernorm",
        queries=f"{base}query_position_embeddings",
        class_head="class_labels_classifier",
        box_head="bbox_predictor",
    )


LAYOUTS = (
    Layout("official DETR", "backbone.0.body"),
    *(
        _hugging_face(resnet, base, backbone)
        for base in ("model.", "")
        for backbone in ("backbone.conv_encoder.model", "backbone.model")  # the second since transformers 5
        for resnet in (_TORCHVISION, _TRANSFORMERS)
    ),
)


def layout_of(names: Collection[str]) -> Layout | None:
    """The layout of a checkpoint's entries, with the module names of transformers 5 where they have those."""
    layout = next((layout for layout in LAYOUTS if layout.depths(names)), None)
    if layout is not None and any(".o_proj." in name for name in names):
        layout = replace(layout, out_projection="o_proj")
    if layout is not None and any(".mlp.fc1." in name for name in names):
        layout = replace(layout, ffn=("mlp.fc1", "mlp.fc2"))
    return layout


def linear_places(theirs: str, ours: str, form: Form = MATRIX, weight: str = "kernel") -> Iterator[Place]:
    """The weight and the bias of a layer."""
    yield Place(f"{theirs}.weight", f"{ours}.{weight}", form)
    yield Place(f"{theirs}.bias", f"{ours}.bias", SAME)


def _conv_norm(theirs: str, pair: tuple[str, str], ours: str) -> Iterator[Place]:
    conv, norm = pair
    yield Place(f"{theirs}.{conv}.weight", f"{ours}.conv.kernel", FILTER)
    for entry, name in (("weight", "scale"), ("bias", "bias"), ("running_mean", "mean"), ("running_var", "var")):
        yield Place(f"{theirs}.{norm}.{entry}", f"{ours}.norm.{name}", SAME)
