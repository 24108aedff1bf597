"""What all commands share: arguments, errors a user can understand, and where a result came from."""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro

from detr_jax.errors import UserError
from detr_jax.mesh import is_first_process, join_cluster

Arguments = TypeVar("Arguments")


def run(command: Callable[[Arguments], None], arguments: type[Arguments], *, many_processes: bool = False) -> None:
    """Parses the command line and runs a command.

    An error that the user can mend becomes one line on stderr and exit status 2; any other keeps its traceback.

    Args:
        command: does the work.
        arguments: a dataclass whose docstring describes the command and whose fields are its options.
        many_processes: the command runs on the hosts of a cluster together, see `detr_jax.mesh.join_cluster`. Only the
            first process shows what it does; errors are shown by all.
    """
    parsed = tyro.cli(arguments, config=(tyro.conf.FlagCreatePairsOff,))
    errors = sys.stderr
    try:
        with contextlib.ExitStack() as stack:
            if many_processes:
                join_cluster()
                if not is_first_process():
                    nowhere = stack.enter_context(Path(os.devnull).open("w"))
                    stack.enter_context(contextlib.redirect_stdout(nowhere))
                    stack.enter_context(contextlib.redirect_stderr(nowhere))
            command(parsed)
    except UserError as error:
        print(f"error: {error}", file=errors)
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
        "devices": jax.device_count(),
    }


def settings(arguments: Any) -> dict:
    """The arguments that decide what a run computes: all but where it goes and what happens to an earlier one."""
    return {key: value for key, value in _as_json(arguments).items() if key not in ("resume", "overwrite", "out")}


def _as_json(arguments: Any) -> dict:
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(arguments).items()
    }
