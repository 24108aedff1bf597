"""The study of tiles and blocks: what it measures of arrays and of a detector, what it writes, and what it refuses."""

import json

import numpy as np
import pytest
from commands import refusal, run
from PIL import Image
from tiny import TINY_CONFIG

pytestmark = pytest.mark.slow

SCRIPT = "studies/tiles.py"
IMAGES, TOKENS, D, FEATURES = 4, 9, 6, 16
OPTIONS = ["--tile-sizes", "1", "4", "64", "--order-tile-sizes", "4", "--block-sizes", "4", "8", "--fit-tile-size", "4"]
OPTIONS += ["--shares", "0.5", "0.25"]
ORDERS = {"own", "coactivation", "kmeans", "contribution", "top-p"}


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"w1": (FEATURES, D), "b1": (FEATURES,), "w2": (D, FEATURES), "x": (IMAGES, TOKENS, D)}
    made = {f"layer0.{key}": rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    made["layer0.b1"] -= 1
    return made


@pytest.fixture(scope="module")
def of_arrays(arrays, tmp_path_factory):
    folder = tmp_path_factory.mktemp("arrays")
    np.savez(folder / "ffn.npz", **arrays)
    run(SCRIPT, "--arrays", folder / "ffn.npz", *OPTIONS, "--out", folder / "run")
    return folder


@pytest.fixture(scope="module")
def of_detector(mixed_shapes, tmp_path_factory):
    out = tmp_path_factory.mktemp("detector") / "run"
    counts = ["--batch-size", "2", "--fit-images", "6", "--images", "6"]
    run(SCRIPT, *mixed_shapes.options, *counts, *OPTIONS, "--out", out)
    return json.loads((out / "results.json").read_text())


def find(results: dict, **setting) -> dict:
    rows = [row for row in results["measured"] if setting.items() <= row.items()]
    assert len(rows) == 1
    return rows[0]


@pytest.mark.parametrize("tile_size", [4, None])
@pytest.mark.parametrize("block_size", [4, 8])
def test_what_it_measures_is_what_a_loop_measures(arrays, of_arrays, tile_size, block_size):
    results = json.loads((of_arrays / "run" / "results.json").read_text())
    w_out = arrays["layer0.w2"].T
    hidden = np.maximum(arrays["layer0.x"][IMAGES // 2 :] @ arrays["layer0.w1"].T + arrays["layer0.b1"], 0)
    norms = np.linalg.norm(w_out, axis=1)
    blocks = FEATURES // block_size
    pairs = firing = making_up = lost = 0
    for image in hidden:
        for start in range(0, TOKENS, tile_size or TOKENS):
            tile = image[start : start + (tile_size or TOKENS)]
            pairs += blocks
            firing += (tile > 0).reshape(len(tile), blocks, -1).any((0, 2)).sum()
            by_block = (tile.sum(0) * norms).reshape(blocks, -1).sum(1)
            descending = np.sort(by_block)[::-1]
            making_up += ((np.cumsum(descending) - descending < 0.99 * by_block.sum()) & (descending > 0)).sum()
            skipped = np.argsort(-by_block)[max(1, round(0.25 * blocks)) :]
            left_out = tile * np.isin(np.arange(FEATURES) // block_size, skipped)
            lost += ((left_out @ w_out) ** 2).sum()
    row = find(results, neurons="own", block_size=block_size, tokens="raster", tile_size=tile_size)
    assert row["firing"] == pytest.approx(firing / pairs)
    assert row["making_up"] == pytest.approx(making_up / pairs) and row["making_up"] <= row["holding"] <= row["firing"]
    assert row["errors"]["0.25"] == pytest.approx(np.sqrt(lost / ((hidden @ w_out) ** 2).sum()), rel=1e-4)


def test_arrays_have_no_grid_and_small_images_no_large_tiles(of_arrays):
    rows = json.loads((of_arrays / "run" / "results.json").read_text())["measured"]
    assert {row["tokens"] for row in rows} == {"raster", "signature"}
    assert {row["tile_size"] for row in rows} == {1, 4, None}
    assert {row["neurons"] for row in rows if row["tile_size"] == 4} == ORDERS


def test_a_detector_is_measured_by_the_same_command(of_detector):
    assert of_detector["images"] == {"fit": 6, "test": 6}
    rows = of_detector["measured"]
    orders = {name: {row["tokens"] for row in rows if row["ffn"] == name} for name in TINY_CONFIG.ffn_names}
    assert all(found == {"raster", "signature"} for found in orders.values())
    for sections in of_detector["sections"].values():
        for size, section in sections.items():
            assert sum(section.values()) == TINY_CONFIG.encoder_ffn_dim
            assert all(count % int(size) == 0 for count in section.values())
    for row in rows:
        assert 0 < row["making_up"] <= row["firing"] <= 1
        assert 0 <= row["errors"]["0.5"] <= row["errors"]["0.25"] < 1.5


def test_tables_and_figures(of_arrays):
    text = (of_arrays / "run" / "tables.md").read_text()
    assert "| blocks of 8, signature" in text and "| blocks of 4, top-p " in text and "2 images for the orders" in text
    for name in ("where", "orders"):
        assert min(Image.open(of_arrays / "run" / f"{name}.png").size) > 300


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "results.json exists; choose another name or pass --overwrite"),
        (["--block-sizes", "5"], "16 hidden neurons cannot be divided into groups of 5"),
        (["--block-sizes", "1"], "--block-sizes must be at least 2, not 1"),
        (["--tile-sizes", "0"], "--tile-sizes must be at least 1, not 0"),
        (["--shares"], "--shares needs at least one value"),
        (["--shares", "1.5"], "--shares must be above 0 and at most 1, not 1.5"),
        (["--need-share", "0"], "--need-share must be above 0 and at most 1, not 0"),
        (["--fit-tile-size", "0"], "--fit-tile-size must be at least 1, not 0"),
        (["--arrays", "none.npz"], "none.npz"),
    ],
)
def test_it_refuses_with_one_line(of_arrays, tmp_path, capsys, extra, message):
    out = tmp_path / "new" if extra else of_arrays / "run"
    assert message in refusal(capsys, SCRIPT, "--arrays", of_arrays / "ffn.npz", *OPTIONS, *extra, "--out", out)
    assert not (tmp_path / "new").exists()
