"""What all commands share: arguments and errors."""

import sys
from dataclasses import dataclass

import pytest

from detr_jax import errors
from detr_jax.commands import cli


@dataclass(frozen=True)
class Arguments:
    """Does nothing."""


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command"])


@pytest.mark.parametrize("error", [kind for kind in vars(errors).values() if isinstance(kind, type)])
def test_an_error_of_the_user_is_one_line(capsys, error):
    def command(arguments):
        raise error("a.json is damaged")

    with pytest.raises(SystemExit) as exit:
        cli.run(command, Arguments)
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: a.json is damaged\n"


@pytest.mark.parametrize("error", [ValueError, OSError, ImportError, KeyError, KeyboardInterrupt])
def test_any_other_error_keeps_its_traceback(error):
    def command(arguments):
        raise error("internal")

    with pytest.raises(error, match="internal"):
        cli.run(command, Arguments)
