"""Published checkpoints: which layout their entries have, and which detector they are."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from detr_jax.convert.checkpoint import Checkpoint, Entry, check_preset, length_of
from detr_jax.convert.deformable import fields as deformable_fields
from detr_jax.convert.deformable import places as deformable_places
from detr_jax.convert.deformable import with_every_head
from detr_jax.convert.facts import Facts
from detr_jax.convert.layouts import LAYOUTS, Layout, Place, layout_of
from detr_jax.errors import InputError
from detr_jax.models import BackboneConfig, ConditionalDetrConfig, DeformableDetrConfig, DetrConfig, preset_config
from detr_jax.models.labels import COCO_LABELS

_ANCHORS = (
    *("class_embed.weight", "class_labels_classifier.weight"),
    *("transformer.level_embed", "model.level_embed", "level_embed"),  # Deformable DETR
)
"""Entries of every detector; what stands before them in a file stands before all entries of the detector."""
_MASK_HEAD = ("mask_head.", "bbox_attention.")


def published_checkpoint(
    source: str, entries: Mapping[str, Entry], preset: str | None = None, facts: Facts | None = None
) -> Checkpoint:
    """A checkpoint in a recognised layout, its configuration inferred from the names and shapes of its entries.

    `source` is the origin of the entries, for messages; the preset whose architecture it has tells what `facts` do not.

    Raises:
        InputError: if the layout is unknown or of an unsupported detector, or preset or facts contradict the entries.
    """
    facts = facts or Facts()
    # facebook/detr-resnet-50 on the hub still holds the step counts of four norms, which frozen ones do not need.
    entries = {name: entry for name, entry in entries.items() if not name.endswith(".num_batches_tracked")}
    entries = _of_the_detector(source, entries)
    layout = layout_of(entries)
    if layout is None:
        known = "; ".join(dict.fromkeys(layout.name for layout in LAYOUTS))
        raise InputError(
            f"{source} is no detector in a known layout ({known}); its entries are {sorted(entries)[:4]} ..."
        )
    kind, pre_norm = _kind(source, layout, entries, facts)
    deformable = kind is DeformableDetrConfig
    places: Callable[[Any], Iterator[Place]] = partial(deformable_places, layout) if deformable else layout.places
    own: dict[str, Any] = deformable_fields(source, layout, entries, facts, preset) if deformable else {}
    defaults = kind(BackboneConfig(layout.depths(entries), block=layout.block(entries)), pre_norm=pre_norm, **own)
    if deformable:
        count = layout.layers("decoder", entries) + own["two_stage"]
        entries = with_every_head(source, layout, entries, count)
    theirs = {place.ours: place.theirs for place in places(defaults)}

    def rows(ours: str, default: int) -> int:
        return length_of(entries, theirs[ours], default)

    widths = enumerate(defaults.backbone.widths)
    backbone = BackboneConfig(
        defaults.backbone.depths,
        widths=tuple(rows(f"backbone.stages.{i}.0.conv1.norm.scale", width) for i, width in widths),
        stem_width=rows("backbone.stem.norm.scale", defaults.backbone.stem_width),
        dilate_last=_dilation(source, facts, preset, defaults.backbone),
        block=defaults.backbone.block,
    )
    no_object = defaults.logits - defaults.classes
    class_bias = "transformer.class_heads.0.bias" if deformable else "class_head.bias"
    config = kind(
        backbone,
        labels=_labels(source, facts, rows(class_bias, defaults.logits) - no_object, preset),
        d_model=rows("transformer.encoder.0.norm1.scale", defaults.d_model),
        encoder_heads=facts.encoder_heads or defaults.encoder_heads,
        decoder_heads=facts.decoder_heads or defaults.decoder_heads,
        encoder_ffn_dim=rows("transformer.encoder.0.ffn.b_in", defaults.encoder_ffn_dim),
        decoder_ffn_dim=rows("transformer.decoder.0.ffn.b_in", defaults.decoder_ffn_dim),
        encoder_layers=layout.layers("encoder", entries),
        decoder_layers=layout.layers("decoder", entries),
        queries=defaults.queries if own.get("two_stage") else rows("transformer.queries", defaults.queries),
        pre_norm=pre_norm,
        preprocessing=facts.preprocessing or (preset_config(preset) if preset else defaults).preprocessing,
        **{name: value for name, value in own.items() if name != "queries"},
    )
    for key, (name, stated) in facts.sizes.items():
        found = getattr(backbone if hasattr(backbone, name) else config, name, False)  # False: it has no such part
        if found != stated:
            raise InputError(f"{source}: its configuration says that {key} is {stated}, its entries say {found}")
    for part, heads in (("encoder", config.encoder_heads), ("decoder", config.decoder_heads)):
        if config.d_model % heads:
            raise InputError(f"{source}: {config.d_model} features cannot be divided among {heads} {part} heads")
    check_preset(source, config, preset)
    return Checkpoint(source, layout.name, config, entries, tuple(places(config)))


def _kind(source: str, layout: Layout, entries: Mapping[str, Entry], facts: Facts) -> tuple[type[DetrConfig], bool]:
    """The configuration's class, and whether layers are pre-norm.

    Raises:
        InputError: if the facts contradict the entries, or the norm order is not supported.
    """
    norm = f"{layout.encoder_norm}.weight"
    pre_norm = norm in entries
    if pre_norm and facts.model_type == "detr":
        warnings.warn(
            f"{source} has {norm}, so its layers are pre-norm, like Table Transformer's, although its configuration "
            "says detr; taken as pre-norm",
            stacklevel=2,
        )
    if not pre_norm and facts.model_type == "table-transformer":
        raise InputError(f"{source} is a table-transformer without {norm}: it is incomplete, or another detector")
    kind: type[DetrConfig] = DetrConfig
    for model_type, name, its_kind, mark in (
        ("conditional_detr", "Conditional DETR", ConditionalDetrConfig, f"{layout.reference_head}.weight"),
        ("deformable_detr", "Deformable DETR", DeformableDetrConfig, f"{layout.transformer}level_embed"),
    ):
        present = mark in entries
        if present != (facts.model_type == model_type) and facts.model_type is not None:
            has = "a" if present else "no"
            raise InputError(
                f"{source}: its configuration says {facts.model_type}, but it has {has} {mark}, as {name} has"
            )
        if present and pre_norm:
            raise InputError(f"{source} has {norm}, but layers of a {name} here are post-norm")
        kind = its_kind if present else kind
    return kind, pre_norm


def _of_the_detector(source: str, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Entries under the names of their layout, without what stands before them all and without a mask head.

    The detector of a panoptic one is in `detr.`; trainers such as Lightning save a model under a name of their own.
    """
    found = {name.removesuffix(head) for name in entries for head in _ANCHORS if f".{name}".endswith(f".{head}")}
    prefix = min(found, key=len, default="")
    if masks := [name for name in entries if name.startswith(_MASK_HEAD)]:
        warnings.warn(
            f"{source} is a panoptic detector: its boxes and classes are loaded, its mask head ({len(masks)} entries "
            f"under {' and '.join(sorted({name.partition('.')[0] for name in masks}))}) is not",
            stacklevel=3,
        )
    return {name.removeprefix(prefix): entry for name, entry in entries.items() if not name.startswith(_MASK_HEAD)}


def _dilation(source: str, facts: Facts, preset: str | None, backbone: BackboneConfig) -> bool:
    if backbone.block == "basic":
        if facts.dilation:
            raise InputError(
                f"{source}: a backbone of basic blocks has no dilated last stage, as its configuration says"
            )
        return False
    if facts.dilation is not None:
        return facts.dilation
    if preset is not None:
        return preset_config(preset).backbone.dilate_last
    warnings.warn(
        f"{source} does not say whether its last stage is dilated (DC5); taken as not. Name a preset to be sure.",
        stacklevel=2,
    )
    return False


def _labels(source: str, facts: Facts, classes: int, preset: str | None) -> tuple[str, ...]:
    if facts.labels is not None:
        if len(facts.labels) != classes:
            raise InputError(f"{source} has {classes} classes, but its configuration names {len(facts.labels)}")
        return facts.labels
    name, guess = (preset, preset_config(preset).labels) if preset else ("COCO", COCO_LABELS)
    if classes != len(guess):
        return tuple(f"LABEL_{index}" for index in range(classes))  # the placeholders of Hugging Face
    warnings.warn(
        f"{source} does not name its {classes} classes; guessed to be those of {name}, which are as many. For others "
        'write a config.json beside it: {"model_type": "detr", "id2label": {"0": "N/A", "1": "cat", ...}}',
        stacklevel=2,
    )
    return guess
