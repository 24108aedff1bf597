"""The folder of a run is claimed by one job, and resumed or deleted only when asked."""

import errno
import subprocess
import sys
from functools import partial

import pytest

from detr_jax.errors import ExistingFileError, InputError, MissingFileError, OutputError
from detr_jax.files import replacing, write_json
from detr_jax.run_folder import open_run

open_run = partial(open_run, outputs=("part",), overwrite=False)


def test_a_run_is_resumed_with_its_own_settings_alone(tmp_path):
    with pytest.raises(MissingFileError, match=r"no run in .* to resume"):
        open_run(tmp_path / "run", {"epochs": 1}, resume=True)
    assert not (tmp_path / "run").exists()
    open_run(tmp_path / "run", {"epochs": 1, "data": "a"}, resume=False)
    open_run(tmp_path / "run", {"epochs": 1, "data": "a"}, resume=True)
    with pytest.raises(InputError, match=r"epochs was 1, now 2$"):
        open_run(tmp_path / "run", {"epochs": 2, "data": "a"}, resume=True)
    with pytest.raises(InputError, match="choose one"):
        open_run(tmp_path / "run", {}, resume=True, overwrite=True)


def test_only_commands_that_can_resume_offer_it(tmp_path):
    open_run(tmp_path, {})
    with pytest.raises(ExistingFileError, match="unfinished run; pass --overwrite or another --out"):
        open_run(tmp_path, {})
    with pytest.raises(ExistingFileError, match="unfinished run; pass --resume, --overwrite or another --out"):
        open_run(tmp_path, {}, resume=False)


def test_a_finished_run_is_only_overwritten(tmp_path):
    open_run(tmp_path, {})
    write_json(tmp_path / "results.json", {})
    (tmp_path / "part").mkdir()
    (tmp_path / "notes.txt").touch()
    for resume in (None, False, True):
        with pytest.raises(ExistingFileError, match="holds a finished run"):
            open_run(tmp_path, {}, resume=resume)
    open_run(tmp_path, {}, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "run.lock", "settings.json"}


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}, {"resume": False}])
def test_the_second_of_two_runs_is_refused_until_the_first_ends(tmp_path, options):
    program = f"""
import sys, pathlib
from detr_jax.run_folder import open_run
open_run(pathlib.Path({str(tmp_path)!r}), {{}}, (), overwrite=False)
print("claimed", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"claimed\n"
        with pytest.raises(ExistingFileError, match="another process runs in"):
            open_run(tmp_path, {}, **options)
    finally:
        process.kill()
        process.wait()
    open_run(tmp_path, {}, resume=True)


def test_a_run_goes_on_after_the_disk_was_full(tmp_path):
    open_run(tmp_path, {})
    with (
        pytest.raises(OutputError, match=r"part cannot be written: .*No space left"),
        replacing(tmp_path / "part") as part,
    ):
        part.touch()
        raise OSError(errno.ENOSPC, "No space left on device")
    (tmp_path / ".detr-jax-unfinished-1-part").touch()  # of a process that was killed as it wrote
    open_run(tmp_path, {}, resume=True)
    assert {path.name for path in tmp_path.iterdir()} == {"run.lock", "settings.json"}


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file/run cannot be written: Not a directory"):
        open_run(tmp_path / "file/run", {})
