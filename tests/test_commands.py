"""What all commands share: arguments and errors."""

import io
import subprocess
import sys
import tomllib
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
from studies.common import open_splits
from tiny import annotation, tiny_detector, write_coco

import detr_jax_command
from detr_jax import errors
from detr_jax.commands import cli
from detr_jax.commands.options import DataOptions, ModelOptions

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Arguments:
    """Does nothing."""


@dataclass(frozen=True)
class Studied:
    """Arguments of a run."""

    out: Path
    coco: Path
    model: str
    epochs: int = 3


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command"])


@pytest.mark.parametrize("error", [errors.UserError, *errors.UserError.__subclasses__()])
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


def test_warnings_are_one_line(capsys):
    def command(arguments):
        warnings.warn("few images", stacklevel=1)

    cli.run(command, Arguments)
    assert capsys.readouterr().err == "warning: few images\n"


def test_names_beyond_the_encoding_of_the_console_are_printed_with_replacement(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    cli.run(lambda arguments: print("caf\udce9 \u00e9t\u00e9"), Arguments)
    console.flush()
    assert console.buffer.getvalue() == b"caf? ?t?\n"


def test_the_installed_command_lists_its_subcommands_without_jax():
    code = "import sys, detr_jax_command; detr_jax_command.main(); print('jax' in sys.modules)"
    listed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    *lines, jax = listed.splitlines()
    assert jax == "False"
    for name, does in detr_jax_command.COMMANDS.items():
        assert f"  {name:<16}{does}" in lines
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"] == {
        "detr-jax": "detr_jax_command:main"
    }


@pytest.mark.parametrize("name", detr_jax_command.COMMANDS)
def test_every_subcommand_explains_every_option(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", ["detr-jax", name, "--help"])
    with pytest.raises(SystemExit) as exit:
        detr_jax_command.main()
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: detr-jax {name}" in printed and "--overwrite" in printed


def test_an_unknown_subcommand_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["detr-jax", "find"])
    with pytest.raises(SystemExit) as exit:
        detr_jax_command.main()
    assert exit.value.code == 2
    assert "no command 'find'; there are detect, evaluate" in capsys.readouterr().err


def test_a_run_is_the_same_wherever_its_inputs_are(tmp_path):
    """Settings of a run have the identity of detector and data in the place of their paths."""
    splits = []
    for name in ("here", "there"):
        root = write_coco(tmp_path / name, [(20, 30)] * 4, [annotation(1, 1, (1, 2, 10, 12))], "train2017")
        write_coco(root, [(20, 30)] * 2, [], "val2017")
        splits.append(open_splits(DataOptions(coco=root), tiny_detector(), 3, 1, 2))
    here, there = (
        cli.settings(Studied(Path(name), coco, "a.safetensors"), detector="0f", **split.fingerprints)
        for name, coco, split in zip(("a", "b"), (tmp_path / "here", "there"), splits, strict=True)
    )
    assert here == there and here["epochs"] == 3 and here["fingerprint of the training"].endswith("[0:3]")
    root = write_coco(tmp_path / "other", [(20, 31)] * 4, [], "train2017")
    other = open_splits(DataOptions(coco=write_coco(root, [(20, 30)] * 2, [], "val2017")), tiny_detector(), 3, 1, 2)
    assert other.fingerprints["training"] != splits[0].fingerprints["training"]


@pytest.mark.parametrize(("size", "sides"), [((96,), (96, 160)), ((96, 300), (96, 300))])
def test_a_size_replaces_that_of_the_checkpoint(size, sides):
    options = ModelOptions(size=size)
    for model in (options.load(), options.load_sparse("detr-tiny")):
        assert (model.preprocessing.shortest_side, model.preprocessing.longest_side) == sides
    with pytest.raises(errors.InputError, match="shorter side and a cap on the longer one, not 300 and 96"):
        ModelOptions(size=(300, 96)).load()
