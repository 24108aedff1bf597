"""Deformable DETR's files, all five variants of it, against transformers."""

import argparse
import dataclasses
import json
import re
import types
import warnings

import numpy as np
import pytest
from coco_images import IMAGES

import detr_jax
from detr_jax.data.images import pixels
from detr_jax.errors import InputError
from detr_jax.models.detr.matching import padded_targets
from detr_jax.models.detr.outputs import DetrOutputs, sigmoid_detections
from detr_jax.training.detector.losses import detection_loss

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import safetensors.torch  # noqa: E402 - needs torch
from torch_detectors import assert_same_outputs, deformable_detr  # noqa: E402 - needs both

VARIANTS = {
    "single-scale": {"num_feature_levels": 1},
    "base": {},
    "with-box-refine": {"with_box_refine": True},
    "with-box-refine-two-stage": {"with_box_refine": True, "two_stage": True},
}


def load_silently(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return detr_jax.load(path)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, tmp_path):
    original = deformable_detr(**VARIANTS[name])
    original.save_pretrained(tmp_path)
    model = load_silently(tmp_path)
    assert model.labels == ("", "cat", "dog")
    assert model.config.refine == original.config.with_box_refine
    assert model.config.two_stage == original.config.two_stage
    assert_same_outputs(model, original)


def official_name(name):
    """The official name of an entry of transformers whose backbone has torchvision's names."""
    parts = (
        ("model.backbone.conv_encoder.model.", "backbone.0.body."),
        ("model.input_proj.", "input_proj."),
        ("model.query_position_embeddings.", "query_embed."),
        ("model.", "transformer."),
    )
    theirs, ours = next(pair for pair in (*parts, ("", "")) if name.startswith(pair[0]))
    name = ours + name.removeprefix(theirs)
    decoder = {"self_attn_layer_norm": "norm2", "encoder_attn_layer_norm": "norm1", "encoder_attn": "cross_attn"}
    encoder = {"self_attn_layer_norm": "norm1"}
    last = {"final_layer_norm": "norm3" if ".decoder." in name else "norm2", "fc1": "linear1", "fc2": "linear2"}
    for theirs, ours in ((decoder if ".decoder." in name else encoder) | last).items():
        name = name.replace(f".{theirs}.", f".{ours}.")
    return name


def official_entries(folder, config):
    """Entries of a folder that `save_pretrained` wrote, as the official training script names and packs them."""
    entries = safetensors.torch.load_file(folder / "model.safetensors")
    renamed = {}
    for name, entry in entries.items():
        for theirs, ours in RESNET:
            name = re.sub(theirs, ours, name)
        renamed[official_name(name)] = entry
    for layer in range(config.decoder_layers):
        own = f"transformer.decoder.layers.{layer}.self_attn"
        for kind in ("weight", "bias"):
            packed = [renamed.pop(f"{own}.{part}_proj.{kind}") for part in "qkv"]
            renamed[f"{own}.in_proj_{kind}"] = torch.cat(packed)
    return renamed


def shift(match):
    return f"layer{int(match[1]) + 1}.{match[2]}."


RESNET = (
    (r"embedder\.embedder\.convolution", "conv1"),
    (r"embedder\.embedder\.normalization", "bn1"),
    (r"encoder\.stages\.(\d)\.layers\.(\d)\.", shift),
    (r"layer\.(\d)\.convolution", lambda match: f"conv{int(match[1]) + 1}"),
    (r"layer\.(\d)\.normalization", lambda match: f"bn{int(match[1]) + 1}"),
    (r"shortcut\.convolution", "downsample.0"),
    (r"shortcut\.normalization", "downsample.1"),
)
"""Names of transformers' ResNet, and torchvision's."""


@pytest.mark.parametrize("name", VARIANTS)
def test_official_files(name, tmp_path):
    """The same parameters as in the folder of transformers, from a file with the official names and arguments."""
    original = deformable_detr(**VARIANTS[name])
    original.save_pretrained(tmp_path)
    config = original.config
    arguments = argparse.Namespace(
        dilation=False,
        nheads=4,
        num_queries=config.num_queries,
        num_feature_levels=config.num_feature_levels,
        enc_n_points=4,
        dec_n_points=4,
        with_box_refine=config.with_box_refine,
        two_stage=config.two_stage,
        position_embedding="sine",
    )
    folder = tmp_path / "official"
    folder.mkdir()
    torch.save({"model": official_entries(tmp_path, config), "args": arguments}, folder / "checkpoint.pth")
    expected, model = detr_jax.load(tmp_path), detr_jax.load(folder / "checkpoint.pth")
    assert detr_jax.fingerprint(model) == detr_jax.fingerprint(expected)
    assert dataclasses.replace(model.config, labels=(), preprocessing=expected.config.preprocessing) == (
        dataclasses.replace(expected.config, labels=())
    )
    arguments.enc_n_points = 2
    torch.save({"model": official_entries(tmp_path, config), "args": arguments}, folder / "checkpoint.pth")
    with pytest.raises(InputError, match=r"args\.enc_n_points is 2, its entries say 4"):
        detr_jax.load(folder / "checkpoint.pth")


def test_dilated_single_scale(tmp_path):
    original = deformable_detr(num_feature_levels=1)
    original.save_pretrained(tmp_path)
    first, *others = original.model.backbone.model.encoder.stages[3].layers
    first.layer[1].convolution.stride = first.shortcut.convolution.stride = (1, 1)
    for block in others:
        block.layer[1].convolution.dilation = block.layer[1].convolution.padding = (2, 2)
    entries = official_entries(tmp_path, original.config)
    folder = tmp_path / "official"
    folder.mkdir()
    torch.save({"model": entries, "args": {"dilation": True, "nheads": 4}}, folder / "checkpoint.pth")
    model = detr_jax.load(folder / "checkpoint.pth")
    assert model.strides == (16,)
    assert_same_outputs(model, original)


def rewrite(folder, entries):
    """The file of weights with other entries."""
    path = folder / "model.safetensors"
    path.unlink()
    safetensors.torch.save_file({name: entry.contiguous() for name, entry in entries.items()}, path)


@pytest.mark.parametrize("kept", ["class_embed.0", "class_embed.1", "model.decoder.class_embed.1"])
def test_one_head_of_all_layers(kept, tmp_path):
    """Files name a head that layers share once, under any of its names."""
    original = deformable_detr(with_box_refine=True, two_stage=True)
    for head in original.class_embed:
        head.load_state_dict(original.class_embed[0].state_dict())
    original.save_pretrained(tmp_path)
    expected = detr_jax.load(tmp_path)
    entries = safetensors.torch.load_file(tmp_path / "model.safetensors")
    parts = ("weight", "bias")
    head = {part: next(e for n, e in entries.items() if n.endswith(f"class_embed.0.{part}")) for part in parts}
    entries = {name: entry for name, entry in entries.items() if "class_embed" not in name}
    rewrite(tmp_path, entries | {f"{kept}.{part}": entry for part, entry in head.items()})
    assert detr_jax.fingerprint(detr_jax.load(tmp_path)) == detr_jax.fingerprint(expected)


def with_copies(folder, change):
    """A folder whose file has the box heads under both of their names, the second one changed."""
    deformable_detr(with_box_refine=True).save_pretrained(folder)
    entries = safetensors.torch.load_file(folder / "model.safetensors")
    both = {}
    for name, entry in entries.items():
        if "bbox_embed" in name:
            short = name.removeprefix("model.decoder.")
            both |= {short: entry.clone(), f"model.decoder.{short}": entry + change}
        else:
            both[name] = entry
    rewrite(folder, both)


def test_copies_of_heads(tmp_path):
    with_copies(tmp_path, 0)
    assert detr_jax.load(tmp_path).config.refine


def test_copies_that_differ_are_refused(tmp_path):
    with_copies(tmp_path, 1)
    with pytest.raises(InputError, match=r"bbox_embed\.0\.layers\.0\.weight and model\.decoder\.bbox_embed.* differ"):
        detr_jax.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "detr"}, "says detr, but it has a model.level_embed, as Deformable DETR has"),
        ({"num_feature_levels": 3}, "num_feature_levels is 3, its entries say 4"),
        ({"encoder_n_points": 2}, "encoder_n_points is 2, its entries say 4"),
        ({"two_stage": True}, "two_stage is True, its entries say False"),
        ({"with_box_refine": False}, "says that boxes are not refined, but it has model.decoder.bbox_embed.0"),
        ({"encoder_attention_heads": 7}, "has no (x, y) for each of 7 heads in 4 levels"),
        ({"position_embedding_type": "learned"}, "position_embedding_type is 'learned'"),
    ],
)
def test_a_configuration_that_contradicts_the_entries_is_refused(changes, message, tmp_path):
    deformable_detr(with_box_refine=True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=re.escape(message)):
        detr_jax.load(tmp_path)


def test_padding_of_a_fixed_size_is_refused(tmp_path):
    """Group norms see it."""
    deformable_detr().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"pad_size": {"height": 800, "width": 800}}))
    with pytest.raises(InputError, match="pad_size is"):
        detr_jax.load(tmp_path)


def test_too_few_tokens_for_the_proposals(tmp_path):
    deformable_detr(with_box_refine=True, two_stage=True).save_pretrained(tmp_path)
    model = detr_jax.load(tmp_path)
    with pytest.raises(InputError, match="30 queries of a two-stage detector need as many tokens; 12 are here"):
        model(np.zeros((1, 16, 32, 3), np.float32))


def test_detections_are_those_of_transformers():
    random = np.random.default_rng(0)
    logits, boxes = random.standard_normal((2, 30, 3)), random.uniform(0.2, 0.4, (2, 30, 4))
    logits, boxes = logits.astype(np.float32), boxes.astype(np.float32)
    sizes = np.array([(480, 640), (427, 300)])
    outputs = types.SimpleNamespace(logits=torch.from_numpy(logits), pred_boxes=torch.from_numpy(boxes))
    processor = transformers.DeformableDetrImageProcessorPil()
    expected = processor.post_process_object_detection(outputs, 0.0, torch.from_numpy(sizes), top_k=90)
    found = sigmoid_detections(logits, boxes, sizes)
    for index, image in enumerate(expected):
        np.testing.assert_allclose(found.scores[index], image["scores"], rtol=1e-6)
        np.testing.assert_array_equal(found.labels[index], image["labels"])
        np.testing.assert_allclose(found.boxes[index], image["boxes"], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "with-box-refine-two-stage"])
def test_at_the_published_size(name, tmp_path):
    """A photograph with a shorter side of 800 pixels, through the published architecture with random weights."""
    backbone = transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    sizes = {"d_model": 256, "encoder_layers": 6, "decoder_layers": 6, "num_queries": 300}
    sizes |= {"encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024, "encoder_attention_heads": 8}
    original = deformable_detr(**VARIANTS[name], **sizes, decoder_attention_heads=8, backbone_config=backbone)
    original.save_pretrained(tmp_path)
    model = load_silently(tmp_path)
    assert_same_outputs(model, original, detr_jax.preprocess_images(pixels(IMAGES[0]), model.preprocessing))


def test_the_loss_is_theirs():
    """With the official weights, 2 for classes in matching and loss."""
    from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

    rng = np.random.default_rng(0)
    labels, counts = rng.integers(0, 5, (3, 4)), (4, 0, 2)
    targets = padded_targets(
        ((labels[i, :count], rng.uniform(0.2, 0.5, (count, 4)).astype(np.float32)) for i, count in enumerate(counts)),
        (3, 4),
    )
    logits = rng.standard_normal((3, 7, 5), np.float32)
    boxes = rng.uniform(0.1, 0.5, (3, 7, 4)).astype(np.float32)
    ours = detection_loss(DetrOutputs(logits, boxes), targets, sigmoid=True)

    matcher = DeformableDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    criterion = DeformableDetrImageLoss(matcher, num_classes=5, focal_alpha=0.25, losses=["labels", "boxes"])
    objects = [
        {
            "class_labels": torch.from_numpy(targets.labels[i, :count]).long(),
            "boxes": torch.from_numpy(targets.boxes[i, :count]),
        }
        for i, count in enumerate(counts)
    ]
    theirs = criterion({"logits": torch.from_numpy(logits), "pred_boxes": torch.from_numpy(boxes)}, objects)
    expected = 2 * theirs["loss_ce"] + 5 * theirs["loss_bbox"] + 2 * theirs["loss_giou"]
    assert float(ours) == pytest.approx(float(expected), rel=1e-5)
