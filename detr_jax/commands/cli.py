"""Arguments, errors and provenance, as all commands have them."""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro

from detr_jax.errors import UserError
from detr_jax.mesh import is_first_process, join_cluster
from detr_jax.run_folder import versions

Arguments = TypeVar("Arguments")
PLACES = ("out", "resume", "overwrite", "model", "preset", "data", "coco", "plan")
"""Arguments that name a place, or say what happens to an earlier run."""


def run_command(name: str) -> None:
    """Runs the command of a module of `detr_jax.commands`: its `main`, with its `Arguments`.

    A module can name another one in `VARIANTS`, by options that make a command that one's.
    """
    module = importlib.import_module(f"detr_jax.commands.{name}")
    given = {argument.partition("=")[0] for argument in sys.argv[1:]}
    for option, variant in getattr(module, "VARIANTS", {}).items():
        if option in given:
            module = importlib.import_module(f"detr_jax.commands.{variant}")
    run(module.main, module.Arguments, many_processes=getattr(module, "MANY_PROCESSES", False))


def run(command: Callable[[Arguments], None], arguments: type[Arguments], *, many_processes: bool = False) -> None:
    """Parses the command line and runs a command.

    An error that the user can mend becomes one line on stderr and exit status 2; any other keeps its traceback. The
    docstring of `arguments`, a dataclass, describes the command, and its fields are the options. With `many_processes`
    the command runs on the hosts of a cluster together, see `detr_jax.mesh.join_cluster`: only the first process shows
    what it does; errors are shown by all.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # names of files and classes may be beyond the console's encoding
    parsed = tyro.cli(arguments, prog=Path(sys.argv[0]).name, config=(tyro.conf.FlagCreatePairsOff,))
    errors = sys.stderr
    try:
        with contextlib.ExitStack() as stack:
            if many_processes:
                join_cluster()
                if not is_first_process():
                    nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
                    stack.enter_context(contextlib.redirect_stdout(nowhere))
                    stack.enter_context(contextlib.redirect_stderr(nowhere))
            stack.enter_context(warnings.catch_warnings())
            warnings.showwarning = _show
            command(parsed)
    except UserError as error:
        print(f"error: {error}", file=errors)
        sys.exit(2)


def _show(message: Warning | str, category: type[Warning], *place: Any, **_: Any) -> None:
    text = f"warning: {message}\n" if category is UserWarning else warnings.formatwarning(message, category, *place[:2])
    sys.stderr.write(text)


def command_line() -> str:
    """The command as it was typed, without the folder that it is in."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def provenance(arguments: Any) -> dict[str, Any]:
    """Provenance of a result: the command's arguments, the versions of the libraries, and the device."""
    return {
        "command": Path(sys.argv[0]).name,
        "arguments": _as_json(arguments),
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
    }


def settings(arguments: Any, **inputs: str) -> dict[str, Any]:
    """Settings on which the results of a run depend, for `detr_jax.run_folder.open_run`.

    Of the arguments, those in `PLACES` are left out; `inputs` are fingerprints of the detector and the data instead.
    """
    kept = {name: value for name, value in _as_json(arguments).items() if name not in PLACES}
    return kept | {f"fingerprint of the {name}": value for name, value in inputs.items()}


def _as_json(arguments: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(arguments), default=str))
