"""Facts beside the weights: Hugging Face's two files, the arguments of official files, and what contradicts them."""

import argparse
import json
import pathlib
import pickle
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from published import empty_entries, parameter_shapes

import detr_jax
from detr_jax import convert
from detr_jax.convert import open_checkpoint
from detr_jax.convert.facts import read_facts
from detr_jax.convert.layouts import LAYOUTS
from detr_jax.errors import InputError
from detr_jax.models import BackboneConfig, DetrConfig, Preprocessing
from detr_jax.models.labels import COCO_LABELS

CONFIG = {"model_type": "detr", "id2label": {"0": "cat", "1": "dog"}, "dilation": False}
RESNET = {"model_type": "resnet", "hidden_act": "relu", "layer_type": "bottleneck", "depths": [3, 4, 6, 3]}
PROCESSOR = {
    "image_processor_type": "DetrImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 480, "longest_edge": 640},
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_pad": True,
}


@pytest.fixture(scope="module")
def entries():
    """Of Hugging Face's DETR, with two layers instead of twelve."""
    names = empty_entries("hf_detr_resnet50_native")
    few = {name: e for name, e in names.items() if not any(f".layers.{i}." in name for i in range(1, 6))}
    backbone = {name: e for name, e in names.items() if "backbone" in name}
    return {name: np.ascontiguousarray(entry) for name, entry in (few | backbone).items()}


@pytest.fixture
def folder(tmp_path):
    def write(config=None, processor=None):
        for name, values in (("config.json", config), ("preprocessor_config.json", processor)):
            if values is not None:
                (tmp_path / name).write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
        return tmp_path

    return write


def test_a_checkpoint_is_fed_as_its_files_say(tmp_path):
    """Files of a fine-tuned detector as Hugging Face writes them: 480 and 640 pixels, mean and deviation of 0.5."""
    folder = shutil.copytree(Path(__file__).parent / "data/preprocessor", tmp_path / "model")
    config = DetrConfig(BackboneConfig((1, 1, 1, 1)), ("",) * 5, encoder_layers=1, decoder_layers=1, queries=20)
    shapes, rng = parameter_shapes(config), np.random.default_rng(0)
    entries = {
        place.theirs: rng.uniform(0.01, 0.1, place.form.shape(shapes[place.ours])).astype(np.float32)
        for place in LAYOUTS[2].places(config)
    }
    safetensors.numpy.save_file(entries, folder / "model.safetensors")
    model = detr_jax.load(folder)
    assert model.preprocessing == HALF
    assert model.labels == ("cat", "dog", "bird", "cow", "boat")
    image = np.random.default_rng(0).integers(0, 256, (72, 96, 3), np.uint8)
    pixel_values, pixel_mask = detr_jax.preprocess_images(image, model.preprocessing)
    assert pixel_values.shape == (1, 480, 640, 3) and pixel_mask.all()
    resized = np.asarray(Image.fromarray(image).resize((640, 480), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(pixel_values[0], resized / 127.5 - 1, atol=1e-6)


SIDES = {"shortest_side": 800, "longest_side": 1333}
HALF = Preprocessing(480, 640, (0.5,) * 3, (0.5,) * 3, resize="transformers")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {}),
        ({"size": 600, "max_size": 1000}, {"shortest_side": 600, "longest_side": 1000}),
        ({"size": 600}, {"shortest_side": 600, "longest_side": 1333}),
        ({"size": {"longest_edge": 1000}}, {"shortest_side": 1000, "longest_side": 1000}),
        ({"size": {"max_height": 600, "max_width": 800}}, SIDES | {"resize": "fit", "box": (600, 800)}),
        ({"size": {"height": 640, "width": 512}}, SIDES | {"resize": "stretch", "box": (640, 512)}),
        ({"do_resize": False}, SIDES | {"resize": "none"}),
        ({"size": None}, SIDES),
        ({"image_mean": None, "image_std": None}, {"mean": Preprocessing().mean, "std": Preprocessing().std}),
        ({"do_normalize": False}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
        ({"rescale_factor": 0.005}, {"rescale": 0.005}),
        ({"do_rescale": False}, {"rescale": 1.0}),
        ({"resample": 3}, {"resample": "bicubic"}),
        ({"do_pad": False, "format": "coco_detection", "pad_size": {"height": 800, "width": 800}}, {}),
    ],
)
def test_forms_of_preprocessing(folder, change, expected):
    assert read_facts(folder(None, PROCESSOR | change)).preprocessing == replace(HALF, **expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"height": 640}}, r"size is \{'height': 640\}; it must be a number or have shortest_edge and"),
        ({"size": {"height": 640, "width": "640"}}, "its sides must be whole numbers above 0"),
        ({"size": {"shortest_edge": 0, "longest_edge": 640}}, "its sides must be whole numbers above 0"),
        ({"size": "large"}, "size is 'large'"),
        ({"resample": 6}, "resample is 6, but the filters of Pillow are 0 to 5"),
        ({"do_center_crop": True}, "do_center_crop is True"),
        ({"image_mean": [0.5]}, r"image_mean is \[0.5\], not 3 numbers"),
        ({"image_std": ["a", 1, 1]}, r"image_std is \['a', 1, 1\], not 3 numbers"),
        ({"image_std": [0, 1, 1]}, "image_std must be above 0"),
        ({"rescale_factor": "1/255"}, "rescale_factor is '1/255', not a number"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order is True, which the preprocessing here does not know"),
        ({"image_processor_type": "ViTImageProcessor"}, "ViTImageProcessor is not the preprocessing of a DETR"),
    ],
)
def test_preprocessing_that_is_not_supported_is_named(folder, change, message):
    with pytest.raises(InputError, match=rf"preprocessor_config\.json: .*{message}"):
        read_facts(folder(None, PROCESSOR | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "rt_detr"}, "model_type is 'rt_detr', but a DETR here has 'detr'"),
        ({"position_embedding_type": "learned"}, "position_embedding_type is 'learned'"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu', but a DETR here has 'relu'"),
        ({"scale_embedding": True}, "scale_embedding is True"),
        ({"num_channels": 1}, "num_channels is 1"),
        ({"id2label": {"1": "cat", "2": "dog"}}, r"id2label must name the classes 0 to 1, but has \[1, 2\]"),
        ({"id2label": {"cat": 0}}, "id2label must map numbers to names"),
        ({"backbone": "resnet50d"}, "backbone is 'resnet50d', but a DETR here has resnet18, resnet34, resnet50"),
        ({"backbone_config": {"model_type": "swin"}}, "backbone_config: model_type is 'swin'"),
        ({"backbone_config": RESNET | {"hidden_act": "gelu"}}, "backbone_config: hidden_act is 'gelu'"),
        ({"backbone_config": RESNET | {"layer_type": "other"}}, "backbone_config: layer_type is 'other'"),
        ({"backbone_config": RESNET | {"downsample_in_bottleneck": True}}, "downsample_in_bottleneck is True"),
        ({"backbone_config": RESNET | {"downsample_in_first_stage": True}}, "downsample_in_first_stage is True"),
        ({"backbone_config": RESNET | {"num_channels": 4}}, "backbone_config: num_channels is 4"),
        ({"backbone_config": RESNET | {"out_features": ["stage3"]}}, "out_features ends with 'stage3'"),
        ({"backbone_config": RESNET | {"out_indices": [3]}}, "out_indices ends with 3"),
        ({"backbone_config": RESNET, "dilation": True}, "dilation is true, which only backbones of timm have"),
        ({"backbone_kwargs": {"output_stride": 8}}, "output_stride is 8, but a DETR here has 32, or 16"),
        ({"backbone_kwargs": {"out_indices": [1, 2, 3]}}, "out_indices ends with 3"),
    ],
)
def test_a_configuration_of_another_function_is_named(folder, change, message):
    with pytest.raises(InputError, match=rf"config\.json: .*{message}"):
        read_facts(folder(CONFIG | change))


@pytest.mark.parametrize("text", ["{", "[1]", "\x80"])
def test_files_that_are_no_json(folder, text):
    (folder() / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"config\.json (is not valid JSON|holds a list)"):
        read_facts(folder())


def test_facts_of_a_configuration(folder):
    names = {"0": "N/A", "1": "Fuß"}
    facts = read_facts(folder(CONFIG | {"id2label": names, "encoder_attention_heads": 4, "dilation": True}))
    assert (facts.labels, facts.dilation, facts.encoder_heads, facts.decoder_heads) == (("", "Fuß"), True, 4, 8)
    facts = read_facts(folder(CONFIG | {"backbone_config": {"model_type": "timm_backbone", "output_stride": 16}}))
    assert facts.dilation


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_queries": 50}, "num_queries is 50, its entries say 100"),
        ({"encoder_layers": 6}, "encoder_layers is 6, its entries say 1"),
        ({"decoder_ffn_dim": 1024}, "decoder_ffn_dim is 1024, its entries say 2048"),
        ({"backbone_config": RESNET | {"depths": [3, 4, 23, 3]}}, r"backbone_config\.depths is \(3, 4, 23, 3\)"),
        ({"backbone_config": RESNET | {"embedding_size": 32}}, r"backbone_config\.embedding_size is 32"),
        ({"backbone_config": RESNET | {"hidden_sizes": [64, 128, 256, 512]}}, r"backbone_config\.hidden_sizes is"),
        ({"id2label": {"0": "cat"}}, "has 2 classes, but its configuration names 1"),
        (
            {"backbone_config": RESNET | {"layer_type": "basic"}},
            r"backbone_config\.layer_type is basic, its .* bottleneck",
        ),
        ({"backbone": "resnet34"}, "the block of the backbone is basic, its entries say bottleneck"),
        ({"normalize_before": True}, "normalize_before is True, its entries say False"),
        ({"model_type": "conditional_detr"}, r"says conditional_detr, but it has no model\.decoder\.ref_point_head"),
        ({"model_type": "table-transformer"}, r"is a table-transformer without model\.encoder\.layernorm\.weight"),
    ],
)
def test_weights_that_contradict_their_configuration_are_refused(folder, entries, change, message):
    with pytest.raises(InputError, match=message):
        convert.published_checkpoint("the file", entries, facts=read_facts(folder(CONFIG | change)))


def test_a_single_file_has_the_facts_beside_it(folder, entries):
    path = folder(CONFIG, PROCESSOR) / "model.safetensors"
    safetensors.numpy.save_file(entries, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = open_checkpoint(path).config
    assert config == open_checkpoint(path.parent).config
    assert config.labels == ("cat", "dog")
    assert (config.preprocessing.shortest_side, config.preprocessing.mean) == (480, (0.5, 0.5, 0.5))


def test_guessed_class_names_are_said_to_be_guessed():
    with pytest.warns(
        UserWarning, match=r"does not name its 91 classes; guessed to be those of detr-r50.*config\.json"
    ):
        checkpoint = convert.published_checkpoint("the file", empty_entries("official_detr_r50"), "detr-r50")
    assert checkpoint.config.labels == COCO_LABELS


class Unknown:
    """Something that a fork stores beside its model."""


@pytest.fixture(scope="module")
def official():
    torch = pytest.importorskip("torch")
    return {name: torch.from_numpy(np.array(e)) for name, e in empty_entries("official_detr_r50").items()}


def saved(file, official, **beside):
    torch = pytest.importorskip("torch")
    few = dict(list(official.items())[-8:])  # recognised only, so that no test writes 166 MB
    torch.save({"model": few} | beside, file)
    return file


def opened(path, monkeypatch):
    """The entries and facts that a file holds, without the check of all arrays."""
    found = []
    monkeypatch.setattr("detr_jax.convert.opening.published_checkpoint", lambda *arguments: found.append(arguments))
    open_checkpoint(path)
    return found[0][1], found[0][3]


@pytest.mark.parametrize(
    "beside",
    [
        {},
        {"args": None},
        {"args": {"dilation": True, "nheads": 4}},
        {"args": argparse.Namespace(dilation=True, nheads=4, output_dir=pathlib.PurePosixPath("out"))},
        {"best": np.float64(0.4), "epoch": np.int64(3), "curve": np.arange(3.0), "flag": np.bool_(True)},
        {"path": pathlib.Path("runs/best")},
    ],
)
def test_files_of_forks_are_read(tmp_path, monkeypatch, official, beside):
    entries, facts = opened(saved(tmp_path / "fork.pth", official, **beside), monkeypatch)
    assert len(entries) == 8
    has_arguments = bool(beside.get("args"))
    assert (facts.dilation, facts.encoder_heads) == ((True, 4) if has_arguments else (None, None))


def test_tensors_that_require_gradients_are_read(tmp_path, monkeypatch, official):
    torch = pytest.importorskip("torch")
    trained = {name: torch.nn.Parameter(value) for name, value in official.items() if value.is_floating_point()}
    entries, _ = opened(saved(tmp_path / "fork.pth", trained), monkeypatch)
    assert all(isinstance(entry, np.ndarray) for entry in entries.values())


def test_what_could_run_code_is_named_with_the_remedy(tmp_path, official):
    path = saved(tmp_path / "fork.pth", official, config=Unknown())
    with pytest.raises(InputError) as error:
        open_checkpoint(path)
    assert "holds a test_facts.Unknown beside its tensors" in str(error.value)
    assert "weights_only=False" in str(error.value) and "\x1b" not in str(error.value)


def test_a_damaged_file_is_named(tmp_path, official):
    path = saved(tmp_path / "short.pth", official)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"short\.pth is damaged or cut short, or no file of torch: \S"):
        open_checkpoint(path)
    path.write_bytes(pickle.dumps({"model": {}}, protocol=4))
    with pytest.raises(InputError, match=r"or cut short, or no file of torch: Unsupported operand 149$"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pre_norm": True}, r".* args\.pre_norm is True, its entries say False"),
        ({"position_embedding": "learned"}, "args: position_embedding is 'learned'"),
    ],
)
def test_arguments_of_another_function_are_named(tmp_path, official, arguments, message):
    with pytest.raises(InputError, match=rf"fork\.pth: {message}"):
        open_checkpoint(saved(tmp_path / "fork.pth", official, args=arguments))


def test_files_that_disagree_are_refused(tmp_path, folder, official):
    path = saved(folder(CONFIG) / "fork.pth", official, args={"dilation": True})
    with pytest.raises(InputError, match=r"fork\.pth says that dilation is True, but .*config\.json says False"):
        open_checkpoint(path)
