"""Published checkpoints: which layout their entries have, and which detector they are."""

import warnings
from collections.abc import Mapping

from detr_jax.convert.checkpoint import Checkpoint, Entry, check_preset
from detr_jax.convert.facts import Facts
from detr_jax.convert.layouts import LAYOUTS
from detr_jax.errors import InputError
from detr_jax.models import BackboneConfig, DetrConfig, preset_config
from detr_jax.models.labels import COCO_LABELS

_PRE_NORM = {"model.encoder.layernorm.weight", "transformer.encoder.norm.weight"}
"""The norm after the encoder, which only detectors with pre-norm layers have."""


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
    layout = next((layout for layout in LAYOUTS if layout.depths(entries)), None)
    if layout is None:
        known = ", ".join(layout.name for layout in LAYOUTS)
        raise InputError(
            f"{source} is no detector in a known layout ({known}); its entries are {sorted(entries)[:4]} ..."
        )
    if found := _PRE_NORM & entries.keys():
        raise InputError(
            f"{source} has {min(found)}: it normalises before its attention and FFNs (pre-norm, as Table Transformer "
            "does), which is not supported yet"
        )
    defaults = DetrConfig(BackboneConfig(layout.depths(entries)))
    theirs = {place.ours: place.theirs for place in layout.places(defaults)}

    def rows(ours: str, default: int) -> int:
        """Length of an entry; the default leaves it to the checkpoint to report one that is missing or has no axes."""
        entry = entries.get(theirs[ours])
        return entry.shape[0] if entry is not None and entry.shape else default

    widths = enumerate(defaults.backbone.widths)
    backbone = BackboneConfig(
        defaults.backbone.depths,
        widths=tuple(rows(f"backbone.stages.{i}.0.conv1.norm.scale", width) for i, width in widths),
        stem_width=rows("backbone.stem.norm.scale", defaults.backbone.stem_width),
        dilate_last=_dilation(source, facts, preset),
    )
    config = DetrConfig(
        backbone,
        labels=_labels(source, facts, rows("class_head.bias", defaults.classes + 1) - 1),
        d_model=rows("transformer.decoder_norm.scale", defaults.d_model),
        encoder_heads=facts.encoder_heads or defaults.encoder_heads,
        decoder_heads=facts.decoder_heads or defaults.decoder_heads,
        encoder_ffn_dim=rows("transformer.encoder.0.ffn.b_in", defaults.encoder_ffn_dim),
        decoder_ffn_dim=rows("transformer.decoder.0.ffn.b_in", defaults.decoder_ffn_dim),
        encoder_layers=layout.layers("encoder", entries),
        decoder_layers=layout.layers("decoder", entries),
        queries=rows("transformer.queries", defaults.queries),
        preprocessing=facts.preprocessing or (preset_config(preset) if preset else defaults).preprocessing,
    )
    for key, (name, stated) in facts.sizes.items():
        if (found := getattr(backbone if hasattr(backbone, name) else config, name)) != stated:
            raise InputError(f"{source}: its configuration says that {key} is {stated}, its entries say {found}")
    for part, heads in (("encoder", config.encoder_heads), ("decoder", config.decoder_heads)):
        if config.d_model % heads:
            raise InputError(f"{source}: {config.d_model} features cannot be divided among {heads} {part} heads")
    check_preset(source, config, preset)
    return Checkpoint(source, layout.name, config, entries, tuple(layout.places(config)))


def _dilation(source: str, facts: Facts, preset: str | None) -> bool:
    if facts.dilation is not None:
        return facts.dilation
    if preset is not None:
        return preset_config(preset).backbone.dilate_last
    warnings.warn(
        f"{source} does not say whether its last stage is dilated (DC5); taken as not. Name a preset to be sure.",
        stacklevel=2,
    )
    return False


def _labels(source: str, facts: Facts, classes: int) -> tuple[str, ...]:
    if facts.labels is not None:
        if len(facts.labels) != classes:
            raise InputError(f"{source} has {classes} classes, but its configuration names {len(facts.labels)}")
        return facts.labels
    if classes != len(COCO_LABELS):
        return tuple(f"LABEL_{index}" for index in range(classes))  # the placeholders of Hugging Face
    warnings.warn(
        f"{source} does not name its {classes} classes; guessed to be those of COCO, which are as many. For others "
        'write a config.json beside it: {"model_type": "detr", "id2label": {"0": "N/A", "1": "cat", ...}}',
        stacklevel=2,
    )
    return COCO_LABELS
