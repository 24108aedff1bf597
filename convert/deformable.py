"""Deformable DETR's entries: their places, the facts that they tell, and the heads that files share or repeat.

Its layouts are those of DETR with other names where the detectors differ; see `layouts`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from detr_jax.convert.checkpoint import Entry, length_of
from detr_jax.convert.facts import Facts
from detr_jax.convert.layouts import FILTER, MATRIX, SAME, Layout, Place, linear_places
from detr_jax.errors import InputError
from detr_jax.models import DeformableDetrConfig, preset_config

_HEADS = {
    "class_embed": ("weight", "bias"),
    "bbox_embed": tuple(f"layers.{index}.{name}" for index in range(3) for name in ("weight", "bias")),
}
_PROPOSALS = {
    "tokens": ("enc_output", MATRIX, "kernel"),
    "tokens_norm": ("enc_output_norm", SAME, "scale"),
    "positions": ("pos_trans", MATRIX, "kernel"),
    "positions_norm": ("pos_trans_norm", SAME, "scale"),
}
_SAMPLING = {"offsets": "sampling_offsets", "weights": "attention_weights", "value": "value_proj", "out": "output_proj"}


def places(layout: Layout, config: DeformableDetrConfig) -> Iterator[Place]:
    """Where a detector of a given configuration has each of its arrays."""
    before = layout.transformer
    yield from layout.backbone_places(config.backbone)
    for level in range(config.levels):
        theirs, ours = f"{layout.level_projection}.{level}", f"input_projections.{level}"
        yield from linear_places(f"{theirs}.0", f"{ours}.conv", FILTER)
        yield from linear_places(f"{theirs}.1", f"{ours}.norm", SAME, "scale")
    for i in range(config.encoder_layers):
        theirs, ours = f"encoder.layers.{i}", f"transformer.encoder.{i}"
        yield from layout.layer_places(theirs, ours, [], layout.encoder_norms)
        yield from _sampling(f"{before}{theirs}.self_attn", f"{ours}.self_attention")
    own = [("self_attn", "self_attention")]
    for i in range(config.decoder_layers):
        theirs, ours = f"decoder.layers.{i}", f"transformer.decoder.{i}"
        yield from layout.layer_places(theirs, ours, own, layout.deformable_decoder_norms)
        yield from _sampling(f"{before}{theirs}.{layout.conditional_attention}", f"{ours}.cross_attention")
    yield Place(f"{before}level_embed", "transformer.levels", SAME)
    if config.two_stage:
        for ours, (theirs, form, weight) in _PROPOSALS.items():
            yield from linear_places(f"{before}{theirs}", f"transformer.proposals.{ours}", form, weight)
    else:
        yield Place(f"{layout.queries}.weight", "transformer.queries", SAME)
        yield from linear_places(f"{before}reference_points", "transformer.reference_points")
    for i in range(config.heads):
        yield from linear_places(f"class_embed.{i}", f"transformer.class_heads.{i}")
        for index in range(3):
            yield from linear_places(f"bbox_embed.{i}.layers.{index}", f"transformer.box_heads.{i}.layers.{index}")


def _sampling(theirs: str, ours: str) -> Iterator[Place]:
    for our_name, their_name in _SAMPLING.items():
        yield from linear_places(f"{theirs}.{their_name}", f"{ours}.{our_name}")


def fields(
    source: str, layout: Layout, entries: Mapping[str, Entry], facts: Facts, preset: str | None
) -> dict[str, Any]:
    """Fields of the configuration that only a Deformable DETR has, from its entries and what is told beside them.

    Raises:
        InputError: if entries have another number of points than heads and levels allow.
    """
    before = layout.transformer
    levels = length_of(entries, f"{before}level_embed", 4)
    sides = [entries.get(f"{layout.level_projection}.{level}.0.weight") for level in range(levels)]
    told = dict(facts.sizes.values())
    if preset is not None and isinstance(config := preset_config(preset), DeformableDetrConfig):
        told = {"refine": config.refine, "two_stage": config.two_stage} | told
    two_stage = f"{before}enc_output.weight" in entries
    copies = sorted(name for name in entries if name.startswith(f"{before}decoder.bbox_embed"))
    if copies and not told.get("refine", True):
        raise InputError(f"{source}: its configuration says that boxes are not refined, but it has {copies[0]}")
    refines = two_stage or bool(copies)
    found = {
        "levels": levels,
        "backbone_levels": max(1, sum(side is not None and side.shape[-1] == 1 for side in sides)),
        "two_stage": two_stage,
        "refine": told.get("refine", refines),
    }
    if two_stage:
        found["queries"] = told.get("queries", 300)
    for part, theirs, heads in (
        ("encoder", "encoder.layers.0.self_attn", facts.encoder_heads or 8),
        ("decoder", f"decoder.layers.0.{layout.conditional_attention}", facts.decoder_heads or 8),
    ):
        name = f"{before}{theirs}.sampling_offsets.bias"
        points, rest = divmod(length_of(entries, name, 8 * heads * levels), 2 * heads * levels)
        if rest or not points:
            raise InputError(f"{source}: {name} has no (x, y) for each of {heads} heads in {levels} levels")
        found[f"{part}_points"] = points
    return found


def with_every_head(source: str, layout: Layout, entries: Mapping[str, Entry], count: int) -> dict[str, Entry]:
    """Entries in which every pair of heads has its own names, and no other ones.

    Files hold a head that layers share once or under the name of each, and those of refinement and proposals also, or
    only, under the decoder.

    Raises:
        InputError: if two entries of the same head differ.
    """
    kept = dict(entries)
    for kind, parts in _HEADS.items():
        prefixes = (kind, f"{layout.transformer}decoder.{kind}")
        heads = {
            (prefix, index): {part: kept.pop(f"{prefix}.{index}.{part}", None) for part in parts}
            for prefix in prefixes
            for index in range(count)
        }
        present = {index for (_, index), found in heads.items() if all(part is not None for part in found.values())}
        for index in range(count):
            source_index = next(iter(present)) if len(present) == 1 else index
            for part in parts:
                same = [found for prefix in prefixes if (found := heads[prefix, source_index][part]) is not None]
                if len(same) == 2 and not np.array_equal(np.asarray(same[0]), np.asarray(same[1])):
                    names = " and ".join(f"{prefix}.{source_index}.{part}" for prefix in prefixes)
                    raise InputError(f"{source}: {names} differ, but are one head")
                if same:
                    kept[f"{kind}.{index}.{part}"] = same[0]
    return kept
