"""The detectors that come with the package, and their plans."""

import importlib.resources
from contextlib import AbstractContextManager
from pathlib import Path

EMBEDDED = {"detr-tiny": 128, "deformable-tiny": 256}
"""Their names, and the pixels a side of the scenes that each is for."""


def detector_file(name: str) -> AbstractContextManager[Path]:
    """Parameters of a detector."""
    return _file(f"{name}.safetensors")


def plan_file(name: str) -> AbstractContextManager[Path]:
    """The plan that makes it sparse."""
    return _file(f"{name}-plan.safetensors")


def _file(name: str) -> AbstractContextManager[Path]:
    return importlib.resources.as_file(importlib.resources.files("detr_jax.weights") / name)
