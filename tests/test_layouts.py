"""The published layouts: every entry used, every array filled, and errors that name what is wrong."""

import re

import numpy as np
import pytest
from published import MANIFESTS, empty_entries, manifest, parameter_shapes, recipe_entries

import detr_jax
from detr_jax import convert

LAYOUTS = {
    "official_detr_r50": ("class_embed.weight", "transformer.decoder.layers.3.multihead_attn.in_proj_weight"),
    "hf_detr_resnet50_timm": ("class_labels_classifier.weight", "model.backbone.conv_encoder.model.layer2.1.bn2.bias"),
    "hf_detr_resnet50_native": ("class_labels_classifier.weight", "model.decoder.layers.5.encoder_attn.q_proj.weight"),
}

STRIDE_32 = convert.Facts(dilation=False)


def read(entries):
    checkpoint = convert.published_checkpoint("the file", entries, facts=STRIDE_32)
    return dict(checkpoint.arrays(parameter_shapes(checkpoint.config)))


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_array_is_filled(name):
    entries = empty_entries(name)
    checkpoint = convert.published_checkpoint("the file", entries, facts=STRIDE_32)
    shapes = parameter_shapes(checkpoint.config)
    assert {array: value.shape for array, value in checkpoint.arrays(shapes)} == shapes
    assert sum(np.prod(shape) for shape in shapes.values()) == sum(entry.size for entry in entries.values())
    assert checkpoint.config.backbone.depths == ((3, 4, 23, 3) if "r101" in name else (3, 4, 6, 3))


def cases():
    return [(name, entry) for name, entries in LAYOUTS.items() for entry in entries]


@pytest.mark.parametrize(("name", "entry"), cases())
def test_missing(name, entry):
    entries = empty_entries(name)
    del entries[entry]
    with pytest.raises(ValueError, match=rf"(?s)the file \(.*missing: {re.escape(entry)} \(\d+"):
        read(entries)


@pytest.mark.parametrize("name", LAYOUTS)
def test_left_over(name):
    entries = empty_entries(name) | {"mask.lay1.weight": np.zeros((8, 8, 3, 3), np.float32)}
    with pytest.raises(ValueError, match=r"left over: mask\.lay1\.weight \(8, 8, 3, 3\)"):
        read(entries)


@pytest.mark.parametrize(("name", "entry"), cases())
def test_misshapen(name, entry):
    entries = empty_entries(name)
    right = entries[entry].shape
    wrong = (*right[:-1], right[-1] + 1)
    entries[entry] = np.zeros(wrong, np.float32)
    with pytest.raises(ValueError, match=re.escape(f"misshapen: {entry} is {wrong}, should be {right}")):
        read(entries)


def test_transposed_entry_is_misshapen():
    entries = empty_entries("official_detr_r50")
    entry = "transformer.encoder.layers.0.linear2.weight"
    entries[entry] = entries[entry].T
    with pytest.raises(ValueError, match=f"misshapen: {re.escape(entry)} "):
        read(entries)


def test_all_problems_in_one_error():
    entries = empty_entries("official_detr_r50")
    del entries["bbox_embed.layers.1.bias"], entries["backbone.0.body.layer4.2.bn3.running_var"]
    entries["extra"] = np.zeros(1, np.float32)
    with pytest.raises(ValueError) as error:
        read(entries)
    for name in ("bbox_embed.layers.1.bias", "backbone.0.body.layer4.2.bn3.running_var", "extra"):
        assert name in str(error.value)


def test_damaged_values():
    entries = empty_entries("official_detr_r50")
    entries["query_embed.weight"] = np.full((100, 256), np.nan, np.float32)
    with pytest.raises(ValueError, match=r"the file is damaged: query_embed\.weight holds NaN"):
        read(entries)


def test_unknown_layout():
    with pytest.raises(ValueError, match=r"the file is no detector in a known layout \(official DETR; .*\['encoder.w'"):
        convert.published_checkpoint("the file", {"encoder.w": np.zeros(1)})


def test_batch_norm_counters_of_the_hub_are_ignored():
    entries = empty_entries("hf_detr_resnet50_timm")
    for layer in (1, 2, 3, 4):
        name = f"model.backbone.conv_encoder.model.layer{layer}.0.downsample.1.num_batches_tracked"
        entries[name] = np.zeros((), np.int64)
    read(entries)


def test_sizes_are_inferred():
    entries = {
        name: entry
        for name, entry in empty_entries("hf_detr_resnet50_native").items()
        if not re.match(r"model\.(encoder\.layers\.[45]|decoder\.layers\.[2-5])\.", name)
    }
    entries["model.query_position_embeddings.weight"] = np.zeros((30, 256), np.float32)
    checkpoint = convert.published_checkpoint("the file", entries, facts=STRIDE_32)
    config = checkpoint.config
    assert (config.encoder_layers, config.decoder_layers, config.queries) == (4, 2, 30)
    assert config.labels == ("LABEL_0", "LABEL_1")
    dict(checkpoint.arrays(parameter_shapes(config)))


@pytest.mark.parametrize("preset", ["detr-r50", "detr-r50-dc5"])
def test_preset_tells_dilation(preset):
    checkpoint = convert.published_checkpoint("the file", empty_entries("official_detr_r50"), preset)
    assert checkpoint.config == detr_jax.preset_config(preset)


def test_silence_about_dilation_is_noted():
    with pytest.warns(UserWarning, match="the file does not say whether its last stage is dilated"):
        checkpoint = convert.published_checkpoint("the file", empty_entries("official_detr_r50"))
    assert not checkpoint.config.backbone.dilate_last


@pytest.mark.parametrize(
    ("preset", "facts", "message"),
    [
        ("detr-r101", None, r"the file is not a detr-r101: depths is \(3, 4, 6, 3\), not \(3, 4, 23, 3\)"),
        ("detr-r50-dc5", STRIDE_32, "the file is not a detr-r50-dc5: dilate_last is False, not True"),
        ("detr-tiny", None, "the file is not a detr-tiny"),
        ("detr-r52", None, "no preset named 'detr-r52'"),
        (None, convert.Facts(False, labels=("cat",)), "the file has 91 classes, but its configuration names 1"),
    ],
)
def test_contradictions(preset, facts, message):
    with pytest.raises(ValueError, match=message):
        convert.published_checkpoint("the file", empty_entries("official_detr_r50"), preset, facts)


# How Hugging Face renamed the official entries, for its timm backbone and then for its own.
RENAMED = (
    (r"^backbone\.0\.body\.", "model.backbone.conv_encoder.model."),
    (r"^transformer\.", "model."),
    (r"^(input_proj|query_embed|class_embed|bbox_embed)\.", lambda m: RENAMED_HEADS[m[1]] + "."),
    (r"decoder\.norm\.", "decoder.layernorm."),
    (r"linear(\d)", r"fc\1"),
    (r"\.norm1\.", ".self_attn_layer_norm."),
    (r"(decoder.*)\.norm2\.", r"\1.encoder_attn_layer_norm."),
    (r"\.norm[23]\.", ".final_layer_norm."),
    (r"multihead_attn", "encoder_attn"),
)
RENAMED_HEADS = {
    "input_proj": "model.input_projection",
    "query_embed": "model.query_position_embeddings",
    "class_embed": "class_labels_classifier",
    "bbox_embed": "bbox_predictor",
}
RENAMED_BACKBONE = (
    (r"model\.conv1\.", "model.embedder.embedder.convolution."),
    (r"model\.bn1\.", "model.embedder.embedder.normalization."),
    (r"layer(\d)\.(\d+)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}."),
    (r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.convolution."),
    (r"\.bn(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.normalization."),
    (r"downsample\.0", "shortcut.convolution"),
    (r"downsample\.1", "shortcut.normalization"),
)


def rename(entries, rules):
    renamed = {}
    for name, entry in entries.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if "in_proj" in name:
            for part, rows in zip("qkv", np.split(entry, 3), strict=True):
                renamed[re.sub(r"in_proj_(\w+)", rf"{part}_proj.\1", name)] = rows
        else:
            renamed[name] = entry
    return renamed


def test_layouts_hold_the_same_detector():
    official = recipe_entries("official_detr_r50")
    timm = rename(official, RENAMED)
    native = rename(timm, RENAMED_BACKBONE)
    shapes = parameter_shapes(detr_jax.preset_config("detr-r50"))
    assert set(timm) == set(manifest("hf_detr_resnet50_timm"))
    assert set(native) == set(manifest("hf_detr_resnet50_native"))
    arrays, *others = (
        dict(convert.published_checkpoint("the file", entries, "detr-r50").arrays(shapes))
        for entries in (official, timm, native)
    )
    for other in others:
        for name in shapes:
            np.testing.assert_array_equal(other[name], arrays[name], err_msg=name)
