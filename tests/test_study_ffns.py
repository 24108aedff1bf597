"""The study of FFNs that are given as arrays: what it measures, what it writes, and what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import refusal, run
from ffn_study import image_batches, measure_effects, read_ffns
from PIL import Image

from detr_jax.calibration.activations import measure, measure_activations
from detr_jax.data.batches import CachedBatches
from detr_jax.methods import METHODS, InputMagnitude, Oracle, Thresholded

pytestmark = pytest.mark.slow

SCRIPT = "studies/ffns.py"
IMAGES, D = 4, 16
FEATURES, TOKENS = {"layer0": 32, "layer2": 64}, {"layer0": 9, "layer2": 6}
DENSITIES = ("0.1", "0.5")
OPTIONS = ["--epochs", "2", "--wide-group-size", "16", "--densities", *DENSITIES, "--taus", "0.9", "0.6"]
OPTIONS += ["--tile-sizes", "1", "4"]


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    made = {}
    for name, features in FEATURES.items():
        shapes = {"w1": (features, D), "b1": (features,), "w2": (D, features), "x": (IMAGES, TOKENS[name], D)}
        made |= {f"{name}.{key}": rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    made["layer0.b2"] = rng.standard_normal(D).astype(np.float32)
    made["layer0.x"] = made["layer0.x"].astype(np.float16)
    return made


def hidden(name: str) -> np.ndarray:
    given = arrays()
    return np.maximum(given[f"{name}.x"].astype(np.float32) @ given[f"{name}.w1"].T + given[f"{name}.b1"], 0)


@pytest.fixture(scope="module")
def ffns_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("ffns") / "samples.npz"
    np.savez(path, **arrays())
    return path


@pytest.fixture(scope="module")
def finished(ffns_file, tmp_path_factory):
    """The folder of a run that replaced an earlier one."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    out.mkdir()
    (out / "results.json").write_text("of an earlier run")
    run(SCRIPT, ffns_file, *OPTIONS, "--out", out, "--overwrite")
    return out


@pytest.fixture(scope="module")
def results(finished):
    return json.loads((finished / "results.json").read_text())


@pytest.mark.parametrize("name", FEATURES)
def test_what_a_part_of_the_neurons_leaves(results, name):
    h, w_out = hidden(name).astype(np.float64), arrays()[f"{name}.w2"].T.astype(np.float64)
    calibration, test = h[: IMAGES // 2], h[IMAGES // 2 :]
    norms = np.linalg.norm(w_out, axis=1)

    def error(contributions: np.ndarray, share: float) -> float:
        count = round(share * h.shape[-1])
        kept = contributions >= np.sort(contributions, axis=-1)[..., -count, None]
        return np.linalg.norm((test * ~kept) @ w_out) / np.linalg.norm(test @ w_out)

    fixed, per_image = calibration.sum((0, 1)) * norms, test.sum(1, keepdims=True) * norms
    assert {title: row[name] for title, row in results["basics"].items()} == pytest.approx(
        {
            "activations that are exactly zero": (test == 0).mean(),
            "neurons that fire at all in an image": (test > 0).any(1).mean(),
            "error, one fixed set of 25 % of the neurons": error(fixed, 0.25),
            "error, best 25 % per image": error(per_image, 0.25),
            "error, best 25 % per 32 consecutive tokens": error(per_image, 0.25),  # no image has more tokens
            "error, one fixed set of 50 %": error(fixed, 0.5),
        },
        rel=1e-3,
    )


@pytest.mark.parametrize("name", FEATURES)
def test_tile_densities(results, name):
    groupings = results["tiles"][name]
    fires = (hidden(name)[IMAGES // 2 :] > 0).reshape(IMAGES // 2, TOKENS[name], -1, 8).any(-1)
    assert groupings["groups of 8, given order"]["raster"]["1"] == pytest.approx(fires.mean())
    assert set(groupings) == {
        "groups of 8, given order",
        "groups of 8 by co-activation",
        "groups of 8 by k-means",
        "groups of 16 by co-activation",
    }
    for orders in groupings.values():
        assert orders["raster"]["1"] == orders["signature"]["1"] <= orders["signature"]["4"]


@pytest.mark.parametrize("name", FEATURES)
def test_every_selector_is_measured(results, name):
    found = results["selectors"][name]
    methods = set(METHODS) - {"oracle"}  # at two granularities
    assert set(found) == {"oracle, neurons", "oracle, groups", *methods}
    fires = hidden(name)[IMAGES // 2 :] > 0
    bound = found["oracle, neurons"]["exact"]
    assert bound == {"error": 0, "density": pytest.approx(fires.mean()), "share": pytest.approx(fires.mean())}
    assert set(found["sibs"]) == {"tau 0.9", "tau 0.6"}
    for method in methods - {"sibs"}:
        sparse, dense = (found[method][density] for density in DENSITIES)
        assert sparse["error"] > 0 and sparse["density"] < 0.5, method
        assert sparse["density"] <= dense["density"] and sparse["share"] <= dense["share"], method
    gate = D * FEATURES[name] / 8 / (2 * D * FEATURES[name])
    assert found["mgs"]["0.5"]["share"] == pytest.approx(found["mgs"]["0.5"]["density"] + gate)
    assert found["teal-hidden"]["0.1"]["share"] == pytest.approx((1 + found["teal-hidden"]["0.1"]["density"]) / 2)


def test_tables_and_figures(results, finished):
    tables = (finished / "tables.md").read_text()
    assert "2 images to calibrate and to train gates on, 2 others to test on" in tables
    for title in ("## What a part", "## Density", "## Selectors", "### mean of the FFNs", "### layer0", "### layer2"):
        assert title in tables
    lines = [line for line in tables.splitlines() if line.startswith("| mgs-contribution ")]
    effect = results["selectors"]["layer2"]["mgs-contribution"]["0.5"]
    assert len(lines) == 3 and lines[2].endswith(
        f"{effect['error']:.3f} {effect['density']:.2f} {effect['share']:.2f} |"
    )
    for name in ("errors.png", "tiles.png"):
        width, height = Image.open(finished / name).size
        assert width > 1000 and height > 400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer0.w1": None}, "layer0.w1 is missing"),
        ({"layer2.x": None}, "layer2.x is missing"),
        ({"layer0.b1": np.zeros(31)}, "layer0.b1 has the shape (31,), should be (32)"),
        ({"layer2.w2": np.zeros((64, D))}, "layer2.w2 has the shape (64, 16), should be (16, 64)"),
        ({"layer0.b2": np.zeros((1, D))}, "layer0.b2 has the shape (1, 16), should be (16)"),
        ({"layer0.w1": np.zeros(32)}, "layer0.w1 has the shape (32,), should be (F, d)"),
        ({"layer0.x": np.zeros((4, 9, 15))}, "layer0.x has the shape (4, 9, 15), should be (images, tokens, 16)"),
        ({"layer0.x": np.zeros((4, 0, D))}, "layer0.x should hold floating-point numbers, has 0 of float64"),
        ({"layer0.x": np.full((4, 9, D), np.nan)}, "layer0.x holds NaN or infinite values"),
        ({"layer2.b1": np.full(64, np.inf)}, "layer2.b1 holds NaN or infinite values"),
        ({"layer2.w1": np.zeros((64, D), int)}, "layer2.w1 should hold floating-point numbers, has 1024 of int64"),
        ({"layer2.x": np.zeros((3, 6, D))}, "layer2.x has 3 images, layer0.x has 4"),
        ({"layer0.bias": np.zeros(D)}, "layer0.bias is not an array of an FFN"),
        ({"layer0.x": np.ones((1, 9, D)), "layer2.x": np.ones((1, 6, D))}, "inputs of 1 image; at least 2"),
        (dict.fromkeys(arrays()), "holds no arrays"),
    ],
)
def test_it_refuses_arrays_with_one_line(tmp_path, capsys, changes, message):
    path = tmp_path / "wrong.npz"
    np.savez(path, **{key: array for key, array in (arrays() | changes).items() if array is not None})
    refuse(capsys, message, path, *OPTIONS, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--group-size", "5"], "32 hidden neurons cannot be divided into groups of 5"),
        (["--wide-group-size", "64"], "32 hidden neurons cannot be divided into groups of 64"),
        (["--densities", "0.1", "1.5"], "--densities must be above 0 and at most 1, not 1.5"),
        (["--taus", "0"], "--taus must be above 0 and at most 1, not 0"),
        (["--tile-sizes"], "--tile-sizes needs at least one value"),
        (["--tile-sizes", "0"], "--tile-sizes must be at least 1, not 0"),
    ],
)
def test_it_refuses_options_with_one_line(ffns_file, tmp_path, capsys, options, message):
    refuse(capsys, message, ffns_file, *OPTIONS, *options, "--out", tmp_path)


def test_it_refuses_what_is_no_archive(tmp_path, capsys):
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name in ("text.npz", "one.npy"):
        refuse(capsys, f"{name} is no .npz archive of arrays", tmp_path / name)
    refuse(capsys, "nowhere.npz", tmp_path / "nowhere.npz")


def test_it_refuses_to_overwrite(ffns_file, finished, capsys):
    before = (finished / "results.json").read_bytes()
    refuse(capsys, "results.json exists; choose another name or pass --overwrite", ffns_file, "--out", finished)
    assert (finished / "results.json").read_bytes() == before


def refuse(capsys, message: str, *arguments) -> None:
    assert message in refusal(capsys, SCRIPT, *arguments)


def test_ffns_are_read_as_they_are(ffns_file):
    ffns, inputs = read_ffns(ffns_file)
    given = arrays()
    assert list(ffns.weights) == list(FEATURES)
    for name, weights in ffns.weights.items():
        np.testing.assert_array_equal(weights.w_in, given[f"{name}.w1"])
        np.testing.assert_array_equal(weights.w_out, given[f"{name}.w2"].T)
        np.testing.assert_array_equal(weights.b_out, given.get(f"{name}.b2", np.zeros(D)))
        np.testing.assert_array_equal(inputs.x[name], given[f"{name}.x"].astype(np.float32))
        assert inputs.tokens[name].all() and inputs.tokens[name].shape == (IMAGES, TOKENS[name])


def test_effects_of_batches_are_those_of_the_whole(ffns_file):
    ffns, inputs = read_ffns(ffns_file)
    selectors = {"layer0": Oracle(8), "layer2": Thresholded(InputMagnitude(weighted=False), jnp.float32(0.8))}
    effects = measure_effects(ffns, image_batches(inputs, range(1, 4), 2), selectors)
    given = arrays()
    x, w_in, w_out = (given[f"layer2.{key}"].astype(np.float64) for key in ("x", "w1", "w2"))
    x = x[1:]
    kept = np.abs(x) >= 0.8
    dense, sparse = (np.maximum(v @ w_in.T + given["layer2.b1"], 0) @ w_out.T for v in (x, x * kept))
    assert effects["layer2"].error == pytest.approx(np.linalg.norm(sparse - dense) / np.linalg.norm(dense), rel=1e-4)
    assert effects["layer2"].density == pytest.approx(kept.mean())
    assert effects["layer2"].share == pytest.approx((1 + kept.mean()) / 2)
    assert effects["layer0"].error == 0


def test_activations_of_any_carrier_add_up_over_batches(ffns_file):
    ffns, inputs = read_ffns(ffns_file)
    found = measure_activations(ffns, CachedBatches(image_batches(inputs, range(IMAGES), 3)))
    for name, trace in ffns.traces(inputs, {}).items():
        kinds = jnp.zeros(trace.tokens.shape, int)
        whole = measure(trace, kinds, kinds_count=1)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found[name], whole)
    with pytest.raises(ValueError, match="no images to measure"):
        measure_activations(ffns, CachedBatches([]))
