"""Exported detectors compute what they compute here, and run without the library."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import refusal, run
from jax import export as jax_export
from PIL import Image
from tiny import TINY_CONFIG, every_selector, tiny_detector
from toy_detector import ToyConfig, ToyDetector

import detr_jax
from detr_jax.data.scenes import ScenesDataset
from detr_jax.data.transforms import normalise, pad
from detr_jax.errors import InputError, MissingDependencyError
from detr_jax.kernels import Execution
from detr_jax.methods import Executed, RoutedExperts
from detr_jax.models import Detector, Selectors
from detr_jax.models.conditional_detr.config import ConditionalDetrConfig
from detr_jax.models.registry import abstract_detector

PAGE = Path(__file__).parent.parent / "docs/serving.md"
SIZE = (32, 40)
SIZES = np.array([SIZE, (32, 24), (20, 40)], np.int32)
UNCONVERTIBLE = ("lots", "top k")
"""Selectors for which jax2onnx writes operators that its ONNX does not have."""


def images(size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (len(SIZES), *size, 3), np.uint8)


def sparse(model: Detector, selectors: Selectors) -> detr_jax.SparseDETR:
    return detr_jax.SparseDETR.of(model, detr_jax.Plan("some", detr_jax.fingerprint(model), selectors, {}, {}, {}, {}))


def kinds(*left_out: str) -> detr_jax.SparseDETR:
    """A detector with a selector of every kind."""
    names = list(every_selector(tiny_detector().ffns["encoder.0"].weights(), 4))
    chosen = [name for name in names if name not in left_out]
    layers = -(-len(chosen) // 2)
    model = tiny_detector(config=replace(TINY_CONFIG, encoder_layers=layers, decoder_layers=layers))
    selectors = {
        ffn: every_selector(model.ffns[ffn].weights(), 4)[kind] for ffn, kind in zip(model.ffns, chosen, strict=False)
    }
    return sparse(model, selectors)


def experts(model: Detector, counts: tuple[int, ...] = (3, 1), widths: tuple[int, ...] = (4, 12)) -> Selectors:
    """Experts with random neurons and routers, which leave some experts without a token."""
    rng = np.random.default_rng(0)

    def of_ffn(hidden: int, d_model: int) -> RoutedExperts:
        def normal(*shape: int) -> jax.Array:
            return jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32)

        count = sum(counts)
        neurons = [
            rng.permuted(np.tile(np.arange(hidden), (n, 1)), axis=1)[:, :k] for n, k in zip(counts, widths, strict=True)
        ]
        return RoutedExperts(
            normal(d_model, count),
            jnp.asarray(np.where(np.arange(count) == 1, -100, 0), jnp.float32),
            tuple(jnp.asarray(stack, jnp.int32) for stack in neurons),
            tuple(normal(n, k, d_model) for n, k in zip(counts, widths, strict=True)),
            normal(count, d_model),
        )

    return {name: of_ffn(spec.hidden, spec.d_model) for name, spec in model.ffn_specs().items()}


def gated(model: Detector) -> detr_jax.SparseDETR:
    return sparse(model, {name: every_selector(f.weights(), 4)["linear gate"] for name, f in model.ffns.items()})


def toy() -> ToyDetector:
    graph, state = jax.tree.flatten(abstract_detector(ToyConfig(), jnp.float32))[::-1]
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(graph, [jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype) for leaf in state])


def called_here(model, pixels: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Detections of images that are preprocessed as `detr_jax.detect` does it."""
    contents = [normalise(image[:h, :w], model.preprocessing) for image, (h, w) in zip(pixels, sizes, strict=True)]
    outputs = jax.jit(lambda model, *inputs: model(*inputs))(model, *pad(contents, pixels.shape[1:3]))
    found = model.detections(outputs, sizes)
    return {"scores": found.scores, "labels": found.labels, "boxes": found.boxes}


def assert_same(found: dict, expected: dict, size: tuple[int, int] = SIZE, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, bound in (("scores", tolerance), ("labels", 0), ("boxes", tolerance * max(size))):
        here, there = np.asarray(expected[name]), np.asarray(found[name])
        assert there.dtype == here.dtype and there.shape == here.shape
        np.testing.assert_allclose(there, here, rtol=0, atol=bound)


def stablehlo(path: Path) -> jax_export.Exported:
    return jax_export.deserialize(bytearray(path.read_bytes()))


def onnx_outputs(path: Path, pixels: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"pixels": pixels, "sizes": sizes}), strict=True))


def operators(path: Path) -> list[str]:
    return [node.op_type for node in pytest.importorskip("onnx").load(path).graph.node]


def conditional() -> Detector:
    return tiny_detector(config=ConditionalDetrConfig(**vars(TINY_CONFIG)))


DETECTORS = {
    "dense": tiny_detector,
    "Conditional DETR": conditional,
    "another architecture": toy,
    "every kind of selector": kinds,
    "groups left out": lambda: gated(tiny_detector()).with_implementation("auto"),
    "experts": lambda: sparse(tiny_detector(), experts(tiny_detector())),
}
COMPUTED = {"dense": {"dense"}, "groups left out": {"xla"}, "experts": {"4 experts"}}
"""The words of the description for FFNs."""


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "every kind of selector")) for kind in DETECTORS]
)
def test_stablehlo_computes_what_the_detector_computes(tmp_path, kind):
    model, path = DETECTORS[kind](), tmp_path / "detector.stablehlo"
    detr_jax.export(model, path, size=SIZE)
    exported = stablehlo(path)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    expected = called_here(model, images(), SIZES)
    assert_same(exported.call(images(), SIZES), expected)
    computed = set(json.loads((tmp_path / "detector.stablehlo.json").read_text())["ffns"].values())
    assert computed == COMPUTED.get(kind, computed)
    one = exported.call(images()[1:2], SIZES[1:2])  # of any number of images
    assert_same(one, {name: array[1:2] for name, array in expected.items()})


def test_values_of_padding_do_not_matter(tmp_path):
    detr_jax.export(tiny_detector(), tmp_path / "detector.stablehlo", size=SIZE)
    call, pixels = stablehlo(tmp_path / "detector.stablehlo").call, images()
    black = pixels.copy()
    black[1, :, 24:], black[2, 20:] = 0, 0
    assert_same(call(black, SIZES), call(pixels, SIZES), tolerance=0)


def test_bfloat16_and_a_fixed_batch(tmp_path):
    model, path = tiny_detector(dtype=jnp.bfloat16), tmp_path / "detector.stablehlo"
    detr_jax.export(model, path, size=SIZE, batch=3, platforms=("cpu",))
    exported = stablehlo(path)
    assert exported.platforms == ("cpu",) and exported.in_avals[0].shape == (3, *SIZE, 3)
    assert_same(exported.call(images(), SIZES), called_here(model, images(), SIZES), tolerance=1e-2)
    with pytest.raises(ValueError, match="shape"):
        exported.call(images()[:1], SIZES[:1])


def test_fixed_sets_become_narrower_ffns(tmp_path):
    model = tiny_detector(config=replace(TINY_CONFIG, encoder_ffn_dim=56, decoder_ffn_dim=56))
    of = {name: every_selector(ffn.weights(), 4) for name, ffn in model.ffns.items()}
    fixed = {"encoder.0": of["encoder.0"]["fixed set"], "decoder.0": Executed(of["decoder.0"]["fixed"], Execution())}
    for name, exported in (("dense", model), ("fixed", sparse(model, fixed))):
        detr_jax.export(exported, tmp_path / f"{name}.stablehlo", size=SIZE)
    described = json.loads((tmp_path / "fixed.stablehlo.json").read_text())
    assert described["ffns"] == {"encoder.0": "52 of 56 neurons", "decoder.0": "18 of 56 neurons"}
    for name, widths in (("dense", {56}), ("fixed", {52, 18})):
        program = stablehlo(tmp_path / f"{name}.stablehlo").mlir_module()
        assert {int(width) for width in re.findall(r"x(56|52|18)xf32>", program)} == widths
    assert all(ffn.w_in.shape == (56, 16) for ffn in model.ffns.values())  # the detector stays as it is


def test_whole_blocks_of_a_fixed_set_are_not_narrowed(tmp_path):
    """An execution that unites groups into blocks computes more than the set."""
    model = tiny_detector()
    selectors = {name: every_selector(ffn.weights(), 4)["fixed set"] for name, ffn in model.ffns.items()}
    model = sparse(model, {name: Executed(s, Execution(block_size=16)) for name, s in selectors.items()})
    detr_jax.export(model, tmp_path / "detector.stablehlo", size=SIZE)
    found = stablehlo(tmp_path / "detector.stablehlo").call(images(), SIZES)
    assert_same(found, called_here(model, images(), SIZES))


def test_the_description(tmp_path):
    model = gated(tiny_detector())
    detr_jax.export(model, tmp_path / "a.graph", size=SIZE, format="stablehlo", platforms=("cpu", "tpu"))
    described = json.loads((tmp_path / "a.graph.json").read_text())
    assert described["inputs"] == {
        "pixels": {"shape": ["b", 32, 40, 3], "dtype": "uint8"},
        "sizes": {"shape": ["b", 2], "dtype": "int32"},
    }
    assert described["outputs"] == {
        "scores": {"shape": ["b", 5], "dtype": "float32"},
        "labels": {"shape": ["b", 5], "dtype": "int32"},
        "boxes": {"shape": ["b", 5, 4], "dtype": "float32"},
    }
    assert described["labels"] == ["", "cat", "dog"] and described["platforms"] == ["cpu", "tpu"]
    assert described["preprocessing"]["shortest_side"] == 32 and described["preprocessing"]["resample"] == "bilinear"
    assert described["fingerprint"] == detr_jax.fingerprint(tiny_detector()) and described["method"] == "some"
    assert described["ffns"] == dict.fromkeys(("encoder.0", "decoder.0"), "masked")
    assert described["versions"]["jax"] == jax.__version__


def test_nothing_is_left_of_an_export_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(jax_export.Exported, "serialize", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        detr_jax.export(tiny_detector(), tmp_path / "detector.stablehlo", size=SIZE)
    assert not list(tmp_path.iterdir())


def test_onnx_needs_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(MissingDependencyError, match=re.escape("detr-jax[onnx]")):
        detr_jax.export(tiny_detector(), tmp_path / "detector.onnx", size=SIZE)


def test_the_command(tmp_path, capsys):
    detr_jax.save(tiny_detector(), tmp_path / "detector.safetensors")
    size = (40, 32)  # neither the sides to which images are resized nor in their order
    arguments = (tmp_path / "detector.safetensors", "--size", *size, "--out", tmp_path / "detector.stablehlo")
    run("export.py", *arguments, "--batch", 3, "--platforms", "cpu")
    assert "detector.stablehlo.json" in capsys.readouterr().out
    found = stablehlo(tmp_path / "detector.stablehlo").call(images(size), SIZES[:, ::-1])
    assert_same(found, called_here(tiny_detector(), images(size), SIZES[:, ::-1]))
    assert "exists; choose another name or pass --overwrite" in refusal(capsys, "export.py", *arguments)
    assert "needs a --plan" in refusal(capsys, "export.py", *arguments, "--overwrite", "--implementation", "auto")


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def run_without_the_library(code: str, folder: Path) -> str:
    """What a program prints in a process that cannot import detr_jax."""
    hidden = f"import sys; sys.modules['detr_jax'] = None\n{code}"
    result = subprocess.run([sys.executable, "-c", hidden], cwd=folder, env=os.environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def detected(model: detr_jax.SparseDETR) -> list[tuple[str, float, list[float]]]:
    """Of the first scene, in the order of the graph's outputs."""
    scene = ScenesDataset("val", 1)[0].image
    found = called_here(model, scene[None], np.array([[128, 128]], np.int32))
    best = np.flatnonzero(np.asarray(found["scores"])[0] >= 0.7)
    return [tuple(np.asarray(found[name])[0, i] for name in ("labels", "scores", "boxes")) for i in best]


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.?\d*(?:e[+-]\d+)?", line)]


@pytest.fixture
def scene(tmp_path) -> Path:
    Image.fromarray(ScenesDataset("val", 1)[0].image).save(tmp_path / "scene.png")
    return tmp_path


def test_the_page_serves_stablehlo(scene, monkeypatch):
    monkeypatch.chdir(scene)
    exporting, serving, _ = snippets()
    exec(exporting, {})
    printed = run_without_the_library(serving, scene).splitlines()
    expected = detected(detr_jax.load_sparse("detr-tiny"))
    assert len(printed) == len(expected) >= 3
    for line, (label, score, box) in zip(printed, expected, strict=True):
        np.testing.assert_allclose(numbers(line), [label, score, *box], atol=1e-3)


# jax2onnx needs 20 seconds to be imported and some for every detector.
onnx_test = pytest.mark.slow


@onnx_test
def test_the_page_serves_onnx(scene):
    pytest.importorskip("jax2onnx")
    model = detr_jax.load_sparse("detr-tiny")
    detr_jax.export(model, scene / "detr-tiny.onnx", size=(128, 128))
    printed = run_without_the_library(snippets()[2], scene).splitlines()
    expected = detected(model)
    assert len(printed) == len(expected) >= 3
    for line, (label, score, box) in zip(printed, expected, strict=True):
        name, values = line.split(" ", 1)
        assert name == model.labels[label]
        np.testing.assert_allclose(numbers(values), [score, *box], atol=1e-3)


@onnx_test
@pytest.mark.parametrize("kind", ["dense", "Conditional DETR", "experts"])
def test_onnx_computes_what_the_detector_computes(tmp_path, kind):
    pytest.importorskip("jax2onnx")
    model, path = DETECTORS[kind](), tmp_path / "detector.onnx"
    detr_jax.export(model, path, size=SIZE)
    expected = called_here(model, images(), SIZES)
    assert_same(onnx_outputs(path, images(), SIZES), expected)
    one = onnx_outputs(path, images()[1:2], SIZES[1:2])
    assert_same(one, {name: array[1:2] for name, array in expected.items()})
    if kind == "experts":  # two products for each of 4 experts of 2 FFNs, and no other of a token with hidden neurons
        assert operators(path).count("Gemm") == 16


@onnx_test
def test_onnx_of_every_kind_of_selector(tmp_path):
    pytest.importorskip("jax2onnx")
    model, path = kinds(*UNCONVERTIBLE), tmp_path / "detector.onnx"
    detr_jax.export(model, path, size=SIZE, batch=3)
    assert_same(onnx_outputs(path, images(), SIZES), called_here(model, images(), SIZES))


@onnx_test
@pytest.mark.parametrize("kind", ["dense", "fixed set", "experts"])
def test_onnx_of_the_embedded_detector(tmp_path, kind):
    pytest.importorskip("jax2onnx")
    model, path = detr_jax.load("detr-tiny"), tmp_path / "detector.onnx"
    if kind == "fixed set":
        model = sparse(model, {name: every_selector(f.weights(), 8)[kind] for name, f in model.ffns.items()})
    if kind == "experts":
        model = sparse(model, experts(model, (6, 2), (32, 96)))
    pixels, sizes = images((128, 128)), np.array([(128, 128), (128, 96), (100, 128)], np.int32)
    pixels[0] = ScenesDataset("val", 1)[0].image
    detr_jax.export(model, path, size=(128, 128))
    assert_same(onnx_outputs(path, pixels, sizes), called_here(model, pixels, sizes), (128, 128))


@onnx_test
@pytest.mark.parametrize("kind", UNCONVERTIBLE)
def test_what_jax2onnx_cannot_convert_is_refused(tmp_path, kind):
    pytest.importorskip("jax2onnx")
    model = tiny_detector()
    model = sparse(model, {"encoder.0": every_selector(model.ffns["encoder.0"].weights(), 4)[kind]})
    with pytest.raises(InputError, match="cannot convert this"):
        detr_jax.export(model, tmp_path / "detector.onnx", size=SIZE, batch=1)
    assert not list(tmp_path.iterdir())
