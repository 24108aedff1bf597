"""Runs that are killed at random moments go on to the same results, bit for bit, and leave no broken file.

`pytest -m slow tests/test_kills.py -s --kills 20` kills twenty times: gate training, a pass of statistics, a fit of
experts and the comparison of selectors, on generated scenes. Without the option only the pass of statistics is killed;
the others take minutes.
"""

import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import SCRIPTS
from PIL import Image
from safetensors import safe_open
from tiny import TINY_CONFIG, tiny_detector

import detr_jax
from detr_jax.models.labels import SCENES_LABELS

pytestmark = pytest.mark.slow

KILLS = 3
MAY_DIFFER = ("seconds", "images_per_second", "out", "resume")
"""Keys of results."""
STATISTICS = """
import pathlib, sys, detr_jax
from detr_jax.data.scenes import ScenesDataset
from detr_jax.run_folder import open_run
from detr_jax.calibration.activations import profile_activations

detector, out, resume = sys.argv[1], pathlib.Path(sys.argv[sys.argv.index("--out") + 1]), "--resume" in sys.argv
model = detr_jax.load(detector)
open_run(out, {}, (), resume=resume, overwrite=False)
path = out / "activations.safetensors"
profile_activations(model, ScenesDataset("train", 200), 2, path, lambda images: None, checkpoint_batches=1)
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, list[str]]:
    """One for each kind of run, as small as it can be."""
    detector = tmp_path_factory.mktemp("detector") / "detector.safetensors"
    detr_jax.save(tiny_detector(config=dataclasses.replace(TINY_CONFIG, labels=SCENES_LABELS)), detector)
    comparison = ["--train-images", "40", "--calibration-images", "4", "--eval-images", "8"]
    training = ["--group-size", "4", "--batch-size", "2", "--checkpoint-steps", "3", "--epochs"]
    experts = ["--method", "experts", "--density", "0.3", "--options", "experts=3", "ranking=obs", "images=16"]
    few = ["--split.train", "40", "--split.calib", "4", "--split.val", "8", "--split.statistics", "8"]
    comparison += [*training, "1", "--tuning-epochs", "1", "--statistics-images", "8", "--allocation-images", "4"]
    comparison += ["--methods", "mgs", "--densities", "0.5", "--sibs-taus", "0.9", "--sibs-indicators", "4"]

    def script(name: str, *arguments: str) -> list[str]:
        return [sys.executable, str(SCRIPTS / name), "--model", str(detector), *arguments]

    return {
        "statistics": [sys.executable, "-c", STATISTICS, str(detector)],
        "gate training": script("train_gates.py", *few, *training, "5"),
        "experts": script("train_gates.py", *few, *training, "1", *experts),
        "comparison": script("compare_selectors.py", *comparison),
    }


def run(command: list[str], out: Path, kill_after: float | None = None) -> float | None:
    """Starts a run, or goes on with it.

    Args:
        command: without the folder.
        out: the folder.
        kill_after: seconds after there is something to resume.

    Returns:
        how long it took from there to its end; None if it was killed before.
    """
    begun = out / "settings.json"
    log = out.parent / f"{out.name}.txt"
    with log.open("a") as file:
        resume = ["--resume"] if begun.exists() else []
        process = subprocess.Popen([*command, "--out", str(out), *resume], stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None and not begun.exists():
            time.sleep(0.005)
        began = time.perf_counter()
        try:
            code = process.wait(kill_after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            code = process.wait()
    assert code in (0, -signal.SIGKILL), log.read_text()[-3000:]
    return None if code and not (out / "results.json").exists() else time.perf_counter() - began


def contents(out: Path) -> dict[str, object]:
    """Every file of a run but for checkpoints by name; a broken one cannot be read."""
    found: dict[str, object] = {}
    for path in out.glob("[!.]*"):
        if path.suffix == ".json":
            found[path.name] = comparable(json.loads(path.read_text()))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
                found[path.name] = {"header": file.metadata(), "arrays": arrays}
        elif path.suffix == ".png":
            found[path.name] = np.asarray(Image.open(path))
        elif path.suffix == ".md":
            found[path.name] = path.read_text()
    return found


def comparable(value: object) -> object:
    if isinstance(value, dict):
        return {name: comparable(entry) for name, entry in value.items() if name not in MAY_DIFFER}
    return value


def assert_same(one: object, other: object) -> None:
    """To the bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other, strict=True)
    else:
        assert one == other


@pytest.mark.parametrize("name", ["statistics", "gate training", "experts", "comparison"])
def test_killed_runs_go_on_to_the_same_results(commands, tmp_path, name, request):
    wanted = request.config.getoption("kills")
    if wanted is None and name != "statistics":
        pytest.skip("takes minutes; runs with --kills 20")
    names = list(commands)
    kills = KILLS if wanted is None else sum(names[kill % len(names)] == name for kill in range(wanted))
    moments = random.Random(name)
    seconds = run(commands[name], tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    seen = runs = 0
    while seen < kills:
        runs += 1
        out, before, took = tmp_path / str(runs), seen, None
        while took is None:  # it may be killed again and again
            took = run(commands[name], out, moments.uniform(0, seconds) if seen < kills else None)
            contents(out)
            seen += took is None
        if seen == before:
            seconds = min(seconds, took)  # the first run compiled
        assert_same(contents(out), whole)
        assert not list(out.rglob(".*")) + list(out.rglob("*tmp*")), "what killed runs left"
    print(f"{name}: {seen} kills of {runs} runs, all with the same results in the end")
