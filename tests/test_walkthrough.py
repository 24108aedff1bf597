"""The page docs/walkthrough.md, walked: every snippet in its order."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import detr_jax
import detr_jax_command
from detr_jax.data.images import pixels

PAGE = Path(__file__).parent.parent / "docs/walkthrough.md"


def snippets() -> list[tuple[str, str]]:
    """Language and text of every block of code."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_walkthrough(tmp_path, monkeypatch):
    pytest.importorskip("jax2onnx")
    monkeypatch.chdir(tmp_path)
    (language, data), *commands, (_, serve) = snippets()
    assert language == "python" and [of for of, _ in commands] == ["sh"] * 4
    exec(data, {})
    for _, command in commands:
        with mock.patch.object(sys, "argv", shlex.split(command)):
            detr_jax_command.main()

    tuned = json.loads(Path("runs/parts/results.json").read_text())
    assert tuned["after"]["numbers"]["AP"] > tuned["before"]["numbers"]["AP"] + 0.3
    test = json.loads(Path("runs/test.json").read_text())
    assert test["numbers"]["AP"] > 0.5
    assert abs(test["AP_minus_dense"]) < 0.05

    served = subprocess.run(
        [sys.executable, "-c", serve], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    model = detr_jax.load_sparse("runs/parts/detector.safetensors", "runs/sparse/plan.safetensors")
    for path in sorted(Path("parts/test").glob("*.jpg")):
        lines = [line.split(" ", 3)[1:] for line in served if line.startswith(path.name)]
        found = model.detect(pixels(path), 0.5)
        assert sorted(name for name, *_ in lines) == sorted(found.names)
        boxes = np.array(sorted(json.loads(box) for *_, box in lines)).reshape(-1, 4)
        np.testing.assert_allclose(boxes, np.array(sorted(found.boxes.tolist())).reshape(-1, 4), atol=2)
    assert len(served) >= 10
