"""Published checkpoints: which layout their entries have, and which detector they are."""

import re
import warnings
from collections.abc import Iterable, Mapping

from detr_jax.convert.checkpoint import Checkpoint, Entry
from detr_jax.convert.facts import Facts
from detr_jax.convert.layouts import LAYOUTS, Layout
from detr_jax.convert.preset import check_preset
from detr_jax.errors import InputError
from detr_jax.models import BackboneConfig, DetrConfig, preset_config
from detr_jax.models.labels import COCO_LABELS

# torch's BatchNorm counts its training steps. Nothing reads the count of a frozen one, but facebook/detr-resnet-50 on
# the hub still holds those of its four downsampling norms.
IGNORED_SUFFIX = ".num_batches_tracked"

STAGES = 4
_PRE_NORM = {"model.encoder.layernorm.weight", "transformer.encoder.norm.weight"}
"""The norm after the encoder, which only detectors have whose layers normalise first."""


def published_checkpoint(
    source: str, entries: Mapping[str, Entry], preset: str | None = None, facts: Facts | None = None
) -> Checkpoint:
    """Recognises the layout of `entries` and infers the detector's configuration from their names and shapes.

    Args:
        source: where the entries are from, for messages.
        entries: name -> array.
        preset: name of the preset that the detector has the architecture of; tells what `facts` does not.
        facts: what is known beyond the entries.

    Raises:
        InputError: if the layout is unknown or of a detector that is not supported, or the preset or the facts
            contradict the entries.
    """
    facts = facts or Facts()
    entries = {name: entry for name, entry in entries.items() if not name.endswith(IGNORED_SUFFIX)}
    layout = _recognise(source, entries)
    if found := _PRE_NORM & entries.keys():
        raise InputError(
            f"{source} has {min(found)}: it normalises before its attention and FFNs (pre-norm, as Table Transformer "
            "does), which is not supported yet"
        )
    depths, encoder_layers, decoder_layers = _sizes(layout, entries)
    defaults = DetrConfig(BackboneConfig(depths))
    theirs = {place.ours: place.theirs for place in layout.places(defaults)}

    def rows(ours: str, default: int) -> int:
        """Length of an entry; the default leaves it to the checkpoint to report one that is missing or has no axes."""
        entry = entries.get(theirs[ours])
        return entry.shape[0] if entry is not None and entry.shape else default

    widths = enumerate(defaults.backbone.widths)
    backbone = BackboneConfig(
        depths,
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
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
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


def _recognise(source: str, names: Iterable[str]) -> Layout:
    for layout in LAYOUTS:
        if any(layout.stages.match(name) for name in names):
            return layout
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise InputError(f"{source} is no detector in a known layout ({known}); its entries are {sorted(names)[:4]} ...")


def _sizes(layout: Layout, names: Iterable[str]) -> tuple[tuple[int, ...], int, int]:
    """Blocks of each stage, encoder layers, decoder layers."""

    def count(indices: Iterable[str]) -> int:
        return 1 + max(map(int, indices), default=0)

    def layers(pattern: re.Pattern) -> int:
        return count(match[1] for name in names if (match := pattern.match(name)))

    blocks = [match.groups() for name in names if (match := layout.stages.match(name))]
    first = min(int(stage) for stage, _ in blocks)
    depths = tuple(count(block for stage, block in blocks if int(stage) == first + index) for index in range(STAGES))
    return depths, layers(layout.encoder), layers(layout.decoder)


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
