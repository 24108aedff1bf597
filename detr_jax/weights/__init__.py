"""The detector that comes with the package, and its plan."""

import importlib.resources
from contextlib import AbstractContextManager
from pathlib import Path

EMBEDDED = "detr-tiny"
"""Its name."""


def detector_file() -> AbstractContextManager[Path]:
    """Its parameters."""
    return _file(f"{EMBEDDED}.safetensors")


def plan_file() -> AbstractContextManager[Path]:
    """The plan that makes it sparse."""
    return _file(f"{EMBEDDED}-plan.safetensors")


def _file(name: str) -> AbstractContextManager[Path]:
    return importlib.resources.as_file(importlib.resources.files("detr_jax.weights") / name)
