"""Figures are `Figure` objects: importing them leaves a notebook's backend alone, and they show what they are given."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import detr_jax
from detr_jax.evaluation.counts import ActivityCounts
from detr_jax.evaluation.evaluate import Scores
from detr_jax.viz.figures import plot_gates, plot_search, save_figure

SCRIPTS = Path(__file__).parent.parent / "scripts"


def test_importing_any_module_leaves_the_backend_alone():
    names = [m.name for m in pkgutil.walk_packages(detr_jax.__path__, "detr_jax.") if "__main__" not in m.name]
    studies = [path.stem for path in (SCRIPTS / "studies").glob("*.py")]
    assert "detr_jax.viz.figures" in names and "tile_study_report" in studies
    code = f"""
import importlib, sys
sys.path += [{str(SCRIPTS)!r}, {str(SCRIPTS / "studies")!r}]
for name in {[*names, *studies, "compare_selectors"]!r}:
    importlib.import_module(name)
import matplotlib
assert "matplotlib.pyplot" not in sys.modules
assert dict.__getitem__(matplotlib.rcParams, "backend") is matplotlib.rcsetup._auto_backend_sentinel
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PATH": "", "JAX_PLATFORMS": "cpu"})


def counts(computed: int) -> ActivityCounts:
    return ActivityCounts(
        neurons=1000,
        neurons_fired=100,
        neurons_computed=computed,
        neurons_left=min(computed, 90),
        groups=100,
        groups_fired=40,
        groups_computed=computed // 10,
        groups_found=min(computed // 10, 36),
        channels=160,
        channels_computed=160,
    )


def run_of(computed: int) -> Scores:
    return Scores(
        *("some data", 10, {"AP": 0.7}, (0.6, 0.75), {}, 0.72, (-0.03, 0.01), 0.01),
        counts={"encoder.0": counts(computed), "decoder.0": counts(computed)},
        executed={},
        tokens=None,
        coco=None,
    )


def test_gates(tmp_path):
    figure = plot_gates("some data", run_of(1000), {"recall 0.9": run_of(400), "half": run_of(500)})
    assert isinstance(figure, Figure)
    sparsity, recall, _ = figure.axes
    assert [bar.get_height() for bar in sparsity.patches] == pytest.approx([0.6, 0.6, 0.5, 0.5])
    assert [bar.get_height() for bar in recall.patches] == pytest.approx([0.9] * 4)
    save_figure(figure, tmp_path / "gates.png")
    assert (tmp_path / "gates.png").stat().st_size > 10_000


@pytest.mark.parametrize("empty", [False, True])
def test_searches_with_and_without_points(empty, tmp_path):
    """A search among fixed sets that cannot become sparse enough has no point for its curves."""
    point = {"time": 0.5, "density": 0.3, "AP_minus_dense": -0.01, "AP_minus_dense_interval": (-0.02, 0.001)}
    curves = {unit: {"any": [] if empty else [point], "fixed sets": []} for unit in ("latency", "density")}
    ffns = {"encoder.0": {"kind": "fixed", "density": 0.3}}
    ffns["decoder.0"] = {"kind": "experts", "density": 0.2}
    figure = plot_search("some data", curves, point, ffns)
    by_time, _, layers = figure.axes
    assert by_time.lines[-2].get_ydata() == pytest.approx([-1.0])
    assert np.isclose(sorted(bar.get_height() for bar in layers.patches)[-1], 0.3)
    save_figure(figure, tmp_path / "search.png")
