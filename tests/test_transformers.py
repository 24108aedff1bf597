"""End to end with torch: files that torch and transformers wrote, loaded here, with equal outputs."""

import argparse
import warnings

import numpy as np
import pytest
import safetensors.numpy
from published import recipe_entries

import detr_jax
from detr_jax import convert
from detr_jax.load import build
from detr_jax.methods import Oracle

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch_detectors import LABELS, assert_same_outputs, with_recipe  # noqa: E402 - needs both


@pytest.fixture(scope="module")
def official():
    return recipe_entries("official_detr_r50")


@pytest.fixture(scope="module")
def official_file(official, tmp_path_factory):
    path = tmp_path_factory.mktemp("official") / "detr-r50.pth"
    torch.save({"model": {name: torch.from_numpy(entry) for name, entry in official.items()}}, path)
    return path


def test_official_file(official, official_file):
    expected = build(convert.published_checkpoint("recipe", official, "detr-r50"))
    model = detr_jax.load(official_file, preset="detr-r50")
    assert model.config == expected.config
    assert detr_jax.fingerprint(model) == detr_jax.fingerprint(expected)


def test_official_training_checkpoint_tells_dilation(official, tmp_path):
    path = tmp_path / "checkpoint.pth"
    state = {name: torch.from_numpy(entry) for name, entry in official.items()}
    torch.save({"model": state, "args": argparse.Namespace(dilation=True, nheads=8), "epoch": 3}, path)
    assert convert.open_checkpoint(path).config == detr_jax.preset_config("detr-r50-dc5")


def test_damaged_official_files(official_file, tmp_path):
    path = tmp_path / "bad.pth"
    for data in (b"", b"no pickle", official_file.read_bytes()[:-1000]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"bad\.pth is damaged or cut short"):
            detr_jax.load(path)
    torch.save({"weights": {}}, path)
    with pytest.raises(ValueError, match=r"bad\.pth is no checkpoint of a detector: .* under 'model'"):
        detr_jax.load(path)


def random_detector(**config):
    layers = {"encoder_layers": 2, "decoder_layers": 2}
    config = transformers.DetrConfig(num_queries=30, id2label=LABELS, **layers | config)
    return with_recipe(transformers.DetrForObjectDetection(config))


@pytest.mark.parametrize("backbone", ["native", "timm", "timm-dc5"])
def test_transformers(backbone, tmp_path):
    if backbone == "native":
        original = random_detector(use_timm_backbone=False)
    else:
        pytest.importorskip("timm")
        original = random_detector(dilation=backbone == "timm-dc5")
    original.save_pretrained(tmp_path, max_shard_size="200MB" if backbone == "native" else "50MB")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = detr_jax.load(tmp_path)
    assert model.config.labels == ("", "cat", "dog")
    assert model.config.backbone.dilate_last == (backbone == "timm-dc5")
    assert (model.config.encoder_layers, model.config.decoder_layers, model.config.queries) == (2, 2, 30)

    assert_same_outputs(model, original)


def test_every_size_that_a_configuration_can_say(tmp_path):
    """Unequal FFNs, heads, layers and another backbone, sparse like the others."""
    sizes = {"encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 96, "decoder_ffn_dim": 64, "d_model": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 2}
    backbone = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 64, 128, 256], depths=[1, 2, 1, 1], out_features=["stage4"]
    )
    original = random_detector(use_timm_backbone=False, backbone=None, backbone_config=backbone, **sizes, **heads)
    original.save_pretrained(tmp_path)
    model = detr_jax.load(tmp_path)
    assert_same_outputs(model, original)

    detr_jax.save(model, tmp_path / "own.safetensors")
    assert detr_jax.load(tmp_path / "own.safetensors").config == model.config
    assert [(spec.hidden, spec.tokens) for spec in model.ffn_specs().values()] == [(96, "image")] * 2 + [
        (64, "query")
    ] * 3
    rng = np.random.default_rng(0)
    orders = {name: rng.permutation(spec.hidden) for name, spec in model.ffn_specs().items()}
    selectors = dict.fromkeys(orders, Oracle(1))
    plan = detr_jax.Plan("oracle", detr_jax.fingerprint(model), selectors, orders, {}, {}, {})
    detr_jax.save_plan(plan, tmp_path / "plan.safetensors")
    sparse = detr_jax.load_sparse(model, tmp_path / "plan.safetensors")
    pixels = rng.standard_normal((1, 64, 96, 3)).astype(np.float32)
    layers = sparse.inspect(pixels)
    assert [layer.hidden.shape[-1] for layer in layers.values()] == [96, 96, 64, 64, 64]
    assert all(layer.density < 1 and layer.recall == 1 for layer in layers.values())
    np.testing.assert_allclose(sparse(pixels).logits, model(pixels).logits, atol=1e-4)
    with pytest.raises(ValueError, match="64 features cannot be divided among 7 decoder heads"):
        convert.published_checkpoint(
            "the file",
            safetensors.numpy.load_file(tmp_path / "model.safetensors"),
            facts=convert.Facts(dilation=False, encoder_heads=4, decoder_heads=7),
        )
