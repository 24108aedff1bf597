"""Loading and saving: our own files, folders, the hub, the embedded detector, and what is said when it fails."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from coco_images import padded, small_images
from flax import nnx
from published import GOLDEN, empty_entries, parameter_shapes, small_entries, telling_entry
from tiny import outputs

import detr_jax
from detr_jax import convert
from detr_jax.errors import InputError, MissingFileError
from detr_jax.load import build
from detr_jax.models.labels import COCO_LABELS
from detr_jax.models.parameters import named_parameters

SCRIPT = Path(__file__).parent.parent / "scripts" / "convert_weights.py"


@pytest.fixture(scope="module")
def tiny():
    config = detr_jax.preset_config("detr-tiny")
    rng = np.random.default_rng(0)
    entries = {name: rng.uniform(0.01, 0.1, shape) for name, shape in parameter_shapes(config).items()}
    return build(convert.Checkpoint("random", "detr-jax", config, entries))


@pytest.fixture(scope="module")
def tiny_file(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    detr_jax.save(tiny, path)
    return path


@pytest.fixture
def rewritten(tiny_file, tmp_path):
    """Writes the tiny file anew, with some header values and arrays replaced (or dropped where None)."""

    def rewrite(header=(), arrays=()):
        with safetensors.safe_open(tiny_file, framework="numpy") as file:
            header = file.metadata() | dict(header)
        arrays = safetensors.numpy.load_file(tiny_file) | dict(arrays)
        path = tmp_path / "rewritten.safetensors"
        arrays = {name: array for name, array in arrays.items() if array is not None}
        safetensors.numpy.save_file(arrays, path, metadata={name: v for name, v in header.items() if v is not None})
        return path

    return rewrite


def write_hub_folder(folder, config=None, entries_of=small_entries):
    """A folder like a repository on the hub, of zeros."""
    folder.mkdir(exist_ok=True)
    entries = {key: np.ascontiguousarray(entry) for key, entry in entries_of("hf_detr_resnet50_timm").items()}
    safetensors.numpy.save_file(entries, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": "detr", **config}))
    return folder


def test_round_trip(tiny, tiny_file):
    loaded = detr_jax.load(tiny_file)
    assert loaded.config == tiny.config
    assert detr_jax.fingerprint(loaded) == detr_jax.fingerprint(tiny)
    pixels = np.random.default_rng(0).standard_normal((1, 96, 128, 3)).astype(np.float32)
    np.testing.assert_array_equal(outputs(loaded, pixels).logits, outputs(tiny, pixels).logits)


def test_names_and_header(tiny, tiny_file):
    with safetensors.safe_open(tiny_file, framework="numpy") as file:
        header = file.metadata()
        assert set(file.keys()) == set(named_parameters(tiny))
    assert (header["format"], header["format_version"]) == ("detr-jax", "2")
    assert header["architecture"] == "detr"
    assert json.loads(header["config"])["queries"] == tiny.config.queries
    assert "transformer.encoder.0.ffn.w_in" in named_parameters(tiny)


def test_dtype_is_of_the_computation(tiny_file):
    model = detr_jax.load(str(tiny_file), dtype=jnp.bfloat16)
    assert model.dtype == jnp.bfloat16
    assert {array.dtype for array in named_parameters(model).values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_files(rewritten, dtype):
    bias = np.linspace(-1, 1, 10).astype(dtype)
    loaded = detr_jax.load(rewritten(arrays={"class_head.bias": bias})).class_head.bias[...]
    assert loaded.dtype == jnp.float32
    np.testing.assert_array_equal(loaded, bias.astype(np.float32))


def test_fingerprint_sees_every_change(tiny):
    prints = {detr_jax.fingerprint(tiny)}
    for path in (("class_head", "bias"), ("backbone", "stem", "norm", "var")):
        changed = nnx.clone(tiny)
        parameter = changed
        for name in path:
            parameter = getattr(parameter, name)
        parameter[...] = parameter[...].at[0].add(1e-6)
        prints.add(detr_jax.fingerprint(changed))
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("header", "arrays", "message"),
    [
        ({"format": "other"}, {}, "is no detector in a known layout"),
        ({"format_version": "3"}, {}, "has format version 3; this detr-jax reads up to 2: update it"),
        ({"format_version": None}, {}, "is damaged: its format_version is ''"),
        ({"config": None}, {}, "is damaged: its header describes no detector"),
        ({"config": '{"backbone": {}}'}, {}, "is damaged: its header describes no detector"),
        ({"config": "[1"}, {}, "is damaged: its header describes no detector"),
        ({}, {"class_head.bias": None}, r"missing: class_head.bias \(10,\)"),
        ({}, {"extra": np.zeros(2)}, r"left over: extra \(2,\)"),
        ({}, {"class_head.bias": np.zeros(9)}, r"misshapen: class_head.bias is \(9,\), should be \(10,\)"),
        ({}, {"class_head.bias": np.full(10, np.nan)}, "is damaged: class_head.bias holds NaN"),
        ({}, {"class_head.bias": np.full(10, np.inf)}, "is damaged: class_head.bias holds NaN or infinite"),
    ],
)
def test_bad_files(rewritten, header, arrays, message):
    path = rewritten(header, arrays)
    with pytest.raises(ValueError, match=rf"(?s)rewritten\.safetensors.*{message}"):
        detr_jax.load(path)


def test_truncated(tiny_file, tmp_path):
    data = tiny_file.read_bytes()
    for length in (0, 100, len(data) - 1):
        path = tmp_path / "short.safetensors"
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"short\.safetensors is damaged or cut short"):
            detr_jax.load(path)


def test_interrupted_write_keeps_the_old_file(tiny, tmp_path, monkeypatch):
    path = tmp_path / "detector.safetensors"
    path.write_bytes(b"old")

    def interrupted(path, content):
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        detr_jax.save(tiny, path)
    assert [p.name for p in tmp_path.iterdir()] == ["detector.safetensors"]
    assert path.read_bytes() == b"old"


def test_preset_must_fit(tiny_file):
    with pytest.raises(ValueError, match=r"tiny\.safetensors is not a detr-r50: depths is"):
        detr_jax.load(tiny_file, preset="detr-r50")
    with pytest.raises(ValueError, match="'detr-r50' is a preset itself and cannot be loaded as 'detr-tiny'"):
        detr_jax.load("detr-r50", preset="detr-tiny")


def test_folder_with_labels_and_dilation(tmp_path):
    folder = write_hub_folder(tmp_path / "hub", {"dilation": True, "id2label": {"0": "N/A", "1": "cat"}}, empty_entries)
    config = detr_jax.load(folder).config
    assert config.backbone.dilate_last
    assert config.labels == ("", "cat")
    with pytest.raises(ValueError, match="hub is not a detr-r50: dilate_last is True, not False"):
        detr_jax.load(folder, preset="detr-r50")


def test_shards(tmp_path):
    folder = write_hub_folder(tmp_path / "hub", {})
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    arrays["class_labels_classifier.bias"] = np.array([1, 2, 3], np.float32)
    (folder / "model.safetensors").unlink()
    shards = {"model-1.safetensors": sorted(arrays)[::2], "model-2.safetensors": sorted(arrays)[1::2]}
    for shard, names in shards.items():
        safetensors.numpy.save_file({name: arrays[name] for name in names}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: shard for shard, names in shards.items() for name in names}}))
    np.testing.assert_array_equal(detr_jax.load(folder).class_head.bias[...], [1, 2, 3])

    (folder / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json names model-2\.safetensors, but"):
        detr_jax.load(folder)
    index.write_text("[]")
    with pytest.raises(ValueError, match=r"index\.json is no index"):
        detr_jax.load(folder)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder 'detr-r52', and no preset .*hub is named"):
        detr_jax.load("detr-r52")
    with pytest.raises(FileNotFoundError, match=r"no file or folder '.*absent\.pth'"):
        detr_jax.load(tmp_path / "absent.pth")
    (tmp_path / "tf_model.h5").touch()
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor .* it holds tf_model\.h5"):
        detr_jax.load(tmp_path)
    with pytest.raises(ValueError, match=r"tf_model\.h5 is neither a folder nor a \.safetensors, \.pth"):
        detr_jax.load(tmp_path / "tf_model.h5")


def test_preset_from_the_hub(tmp_path, monkeypatch):
    folder = write_hub_folder(tmp_path / "hub", entries_of=empty_entries)
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    arrays["class_labels_classifier.weight"] = np.zeros((92, 256), np.float32)
    arrays["class_labels_classifier.bias"] = np.zeros(92, np.float32)
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    asked = []

    def download(*args, **kwargs):
        asked.append((*args, kwargs))
        return str(folder / "model.safetensors")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model = detr_jax.load("detr-r50-dc5")
    assert model.config == detr_jax.preset_config("detr-r50-dc5")
    assert model.config.labels == COCO_LABELS
    assert asked == [("facebook/detr-resnet-50-dc5", "model.safetensors", {"revision": "main"})]


@pytest.mark.parametrize(
    "name", ["runs/detr", "weights/detr", "./detr", "/weights/detr", "weights/a/detr", "a/detr.bin"]
)
def test_a_mistyped_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    Path("weights").mkdir()
    with pytest.raises(MissingFileError, match=r"no file or folder .* named owner/name, or hf://owner/name where"):
        detr_jax.load(name)


def test_a_hub_id_whose_owner_is_a_folder_too(tmp_path, monkeypatch):
    folder = write_hub_folder(tmp_path / "someone", {"id2label": {"0": "cat", "1": "dog"}})
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(folder))
    monkeypatch.chdir(tmp_path)
    assert detr_jax.load("hf://someone/detr-pets").config.labels == ("cat", "dog")
    assert asked == ["someone/detr-pets"]


def test_a_detector_that_is_loaded_has_its_dtype(tiny):
    for options in ({"dtype": jnp.bfloat16}, {"preset": "detr-tiny"}):
        with pytest.raises(InputError, match="preset= and dtype= are for detectors that are loaded here"):
            detr_jax.load_sparse(tiny, "detr-tiny", **options)


def test_hub_id(tmp_path, monkeypatch):
    folder = write_hub_folder(tmp_path / "hub", {"id2label": {"0": "cat", "1": "dog"}})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, **kwargs: str(folder))
    assert detr_jax.load("someone/detr-pets").config.labels == ("cat", "dog")


@pytest.mark.parametrize("name", ["detr-r101", "someone/detr-pets"])
def test_offline(name, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError) as error:
        detr_jax.load(name)
    message = str(error.value)
    for part in ("facebook/detr-resnet-101" if name == "detr-r101" else name, str(tmp_path / "cache"), "HF_HOME"):
        assert part in message
    assert "detr_jax.load('detr-tiny') needs no download" in message


def test_a_transfer_that_fails_in_its_own_way(monkeypatch):
    class ProxyError(Exception):
        pass

    def download(*args, **kwargs):
        raise ProxyError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(FileNotFoundError, match=r"detr-resnet-50 at revision 1d5f.*no route"):
        detr_jax.load("detr-r50")


def test_embedded(tiny, tiny_file, monkeypatch):
    def package(name):
        assert name == "detr_jax.weights"
        return tiny_file.parent

    monkeypatch.setattr("importlib.resources.files", package)
    tiny_file.rename(tiny_file.with_name("detr-tiny.safetensors"))
    try:
        assert detr_jax.fingerprint(detr_jax.load("detr-tiny")) == detr_jax.fingerprint(tiny)
    finally:
        tiny_file.with_name("detr-tiny.safetensors").rename(tiny_file)


def test_import_is_light():
    """Nothing slow beside JAX and Flax, which load what they like, and no device."""
    code = (
        "import sys, jax, flax.nnx; from jax._src import xla_bridge; before = set(sys.modules); import detr_jax; "
        "assert not xla_bridge.backends_are_initialized(), 'a device was initialised'; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert {name for name in printed.split() if not name.startswith("_")} <= {
        *("detr_jax", "numpy", "safetensors", "PIL"),
        *("jaxtyping", "wadler_lindig"),
    }


def convert_weights(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_script(tiny, tiny_file, tmp_path, monkeypatch, capsys):
    target = tmp_path / "converted.safetensors"
    convert_weights(monkeypatch, tiny_file, target)
    printed = capsys.readouterr().out
    assert f"read {tiny_file}: ResNet (2, 2, 2) of stride 16" in printed
    assert f"wrote {target}" in printed
    assert detr_jax.fingerprint(tiny) in printed
    assert detr_jax.fingerprint(detr_jax.load(target)) == detr_jax.fingerprint(tiny)

    with pytest.raises(SystemExit):
        convert_weights(monkeypatch, tiny_file, target)
    assert f"{target} exists" in capsys.readouterr().err
    convert_weights(monkeypatch, tiny_file, target, "--overwrite")


def test_script_help(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        convert_weights(monkeypatch, "--help")
    printed = capsys.readouterr().out
    for text in ("--preset", "--overwrite", "hub id"):
        assert text in printed


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("small_*.npz")))
def test_small_detectors_of_transformers(name, tmp_path):
    """Outputs that `golden/make_small.py` wrote, where neither torch nor transformers is needed."""
    golden = np.load(GOLDEN / f"{name}.npz")
    (tmp_path / "config.json").write_text(str(golden["config"]))
    shapes = json.loads(str(golden["shapes"]))
    entries = {key: telling_entry(key, tuple(shape)) for key, shape in shapes.items()}
    safetensors.numpy.save_file(entries, tmp_path / "model.safetensors")
    model = detr_jax.load(tmp_path)
    found = model(*padded(small_images(model.config)))
    np.testing.assert_allclose(found.logits, golden["logits"], rtol=0, atol=2e-4)
    np.testing.assert_allclose(found.boxes, golden["boxes"], rtol=0, atol=2e-5)


def test_presets_of_table_transformer(tmp_path):
    """Its file, without a configuration, has the classes and the preprocessing of the preset."""
    golden = np.load(GOLDEN / "small_table_transformer.npz")
    shapes = {key: tuple(shape) for key, shape in json.loads(str(golden["shapes"])).items()}
    entries = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    safetensors.numpy.save_file(entries, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"is not a table-transformer-detection: depths is \(2, 1, 1, 1\), not \(2, 2"):
        detr_jax.load(tmp_path, preset="table-transformer-detection")
    for name, classes, queries, side in (("detection", 2, 15, 800), ("structure", 6, 125, 1000)):
        config = detr_jax.preset_config(f"table-transformer-{name}")
        shapes = parameter_shapes(config)
        assert (config.classes, config.queries, config.preprocessing.longest_side) == (classes, queries, side)
        assert shapes["transformer.encoder_norm.scale"] == (256,)
        assert shapes["input_projection.kernel"] == (512, 256)
        assert "backbone.stages.0.0.downsample.conv.kernel" not in shapes
