import ast
import errno
import json
import resource
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from detr_jax.errors import OutputError
from detr_jax.files import refuse_existing, remove_leftovers, replacing, write_json
from detr_jax.safetensors_io import write_arrays


def test_results_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder/result.json"
    write_json(path, {"AP": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"AP": float("inf")})
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"AP": 0.5}
    assert list(path.parent.iterdir()) == [path]


def test_undefined_numbers_are_null(tmp_path):
    write_json(tmp_path / "result.json", {"AP": float("nan"), "interval": (np.float64("nan"), 0.5), "name": "ü"})
    assert json.loads((tmp_path / "result.json").read_bytes()) == {"AP": None, "interval": [None, 0.5], "name": "ü"}


def test_finished_results_are_refused(tmp_path):
    path = tmp_path / "result.json"
    refuse_existing(path, overwrite=False)
    path.touch()
    refuse_existing(path, overwrite=True)
    with pytest.raises(FileExistsError, match=r"result\.json exists; .*--overwrite"):
        refuse_existing(path, overwrite=False)


def test_what_a_killed_process_began_to_write_is_removed(tmp_path):
    path = tmp_path / "parts" / "result.json"
    write_json(path, {})
    with replacing(path) as temporary:
        temporary.write_text("half")
        remove_leftovers(tmp_path)
        assert list(path.parent.iterdir()) == [path]
        temporary.write_text("{}")


def test_no_file_but_the_temporary_one_is_written(tmp_path):
    """A killed process must leave nothing that `remove_leftovers` does not know."""
    temporary = tmp_path / "temporary"
    writer = threading.Thread(target=write_arrays, args=(temporary, {"a": np.zeros(1 << 27, np.uint8)}, {}))
    writer.start()
    seen = set()
    while writer.is_alive():
        seen |= {path.name for path in tmp_path.iterdir()}
    assert seen == {temporary.name}


def test_files_of_the_user_are_no_leftovers(tmp_path):
    names = [".2024-notes.txt", ".1-result.json", ".detr-jax.json"]
    for name in names:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


@pytest.fixture
def small_disk():
    """No file can grow beyond 64 KB, as where the disk is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("format", ["json", "safetensors"])
def test_a_full_disk_is_named_with_the_file(tmp_path, small_disk, format):
    path = tmp_path / f"result.{format}"
    with pytest.raises(OutputError, match=rf"result\.{format} cannot be written: .*[Ff]ile too large"):
        if format == "json":
            write_json(path, "a" * (1 << 17))
        else:
            with replacing(path) as temporary:
                write_arrays(temporary, {"a": np.zeros(1 << 17, np.uint8)}, {})
    assert not list(tmp_path.iterdir())


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "result.json"):
        raise ZeroDivisionError
    with pytest.raises(OutputError, match="No space left") as error, replacing(tmp_path / "result.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert isinstance(error.value.__cause__, OSError)


def test_where_nothing_can_be_written_is_known_before(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file is none"):
        refuse_existing(tmp_path / "file/result.json", overwrite=False)
    with pytest.raises(OutputError, match="cannot be written: it is a folder"):
        refuse_existing(tmp_path, overwrite=True)


def test_text_is_utf8_whatever_the_locale_says():
    """Every read and write of text names its encoding."""
    root = Path(__file__).parent.parent
    silent = []
    for path in (p for folder in ("detr_jax", "kernels", "convert", "scripts") for p in (root / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            opens = node.func.attr == "open" and any(mode in texts for mode in ("r", "w", "a"))
            named = "encoding" in {keyword.arg for keyword in node.keywords}
            if (opens or node.func.attr in ("read_text", "write_text")) and not named:
                silent.append(f"{path.relative_to(root)}:{node.lineno}")
    assert silent == []
