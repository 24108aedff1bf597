"""What all commands share: arguments, errors a user can understand, and where a result came from."""

import dataclasses
import importlib.metadata
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro

Arguments = TypeVar("Arguments")


def run(command: Callable[[Arguments], None], arguments: type[Arguments]) -> None:
    """Parses the command line and runs a command; bad input becomes one line on stderr and exit status 2.

    Args:
        command: does the work.
        arguments: a dataclass whose docstring describes the command and whose fields are its options.
    """
    parsed = tyro.cli(arguments, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        command(parsed)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def provenance(arguments: Any) -> dict:
    """What made a result: the command's arguments, the versions of what it used, and the device."""
    packages = ("detr-jax", "jax", "flax", "numpy", "pillow", "pycocotools")
    return {
        "command": Path(sys.argv[0]).name,
        "arguments": _as_json(arguments),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in packages},
        "device": jax.devices()[0].device_kind,
    }


def settings(arguments: Any) -> dict:
    """The arguments that decide what a run computes: all but where it goes and what happens to an earlier one."""
    return {key: value for key, value in _as_json(arguments).items() if key not in ("resume", "overwrite", "out")}


def _as_json(arguments: Any) -> dict:
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(arguments).items()
    }
