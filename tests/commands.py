"""Running the scripts in this process, so that what JAX compiled for one test serves the next; and what other
processes need."""

import os
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


def run(script: str, *arguments: object) -> None:
    """Runs a script by name as from the command line."""
    with mock.patch.object(sys, "argv", [script, *map(str, arguments)]):
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")


def refusal(capsys, script: str, *arguments: object) -> str:
    """The line by which a script refuses its arguments; progress may stand before it."""
    with pytest.raises(SystemExit) as exit:
        run(script, *arguments)
    assert exit.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


def cpu_devices(count: int) -> dict[str, str]:
    """Environment variables that give a process so many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
