"""The folder of a long run: claimed by one job, and resumed or deleted only when asked."""

import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from detr_jax import safetensors_io
from detr_jax.errors import ExistingFileError, InputError, MissingFileError, OutputError, UserError
from detr_jax.files import remove_leftovers, write_json
from detr_jax.mesh import first_process_agrees, is_first_process
from detr_jax.safetensors_io import Arrays, Format, Part

RESULTS = "results.json"
"""Written last: a folder that holds it holds a finished run."""
PARTS = "parts"
"""Folder of what `resumable_parts` keeps."""
_PART = Format("detr-jax-part", 1, "a part of a fit", "a fit leaves it")
_LOCKS: dict[Path, IO[str]] = {}
"""Held until `release_run`, or until this process ends, however it does."""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that make a result, by name."""
    packages = ("detr-jax", "jax", "flax", "numpy", "pillow", "pycocotools")
    return {"python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in packages
    }


def open_run(
    folder: Path, settings: dict[str, Any], outputs: Sequence[str], *, resume: bool | None = None, overwrite: bool
) -> None:
    """Claims the output folder of a run; for after all inputs are checked.

    Args:
        folder: of the run; all processes of a job have to see the same.
        settings: whatever decides what the run computes; a resumed run must have the same.
        outputs: names of the files and folders that a run writes.
        resume: go on with an unfinished run; None where a command cannot.
        overwrite: delete an earlier run.

    Raises:
        UserError: if the run in the folder, its settings, another process or permissions forbid it.
    """
    refusal = None
    if is_first_process():
        try:
            _claim(folder, json.loads(json.dumps(settings, default=str)), outputs, resume, overwrite)
        except UserError as error:
            refusal = error
    if not first_process_agrees(refusal is None):
        raise refusal or InputError(f"the job's first process refuses {folder} and says why")
    if not (folder / "settings.json").exists():
        raise MissingFileError(f"{folder} is not the folder of the job's first process; --out has to be a shared one")


def _claim(
    folder: Path, settings: dict[str, Any], outputs: Sequence[str], resume: bool | None, overwrite: bool
) -> None:
    stored = folder / "settings.json"
    if overwrite and resume:
        raise InputError("--resume keeps the run in the output folder and --overwrite deletes it; choose one")
    if resume and not stored.exists():
        raise MissingFileError(f"there is no run in {folder} to resume")
    _lock(folder)
    if (folder / RESULTS).exists() and not overwrite:
        raise ExistingFileError(f"{folder} holds a finished run; choose another --out or pass --overwrite")
    if stored.exists() and not (overwrite or resume):
        ways = "--overwrite" if resume is None else "--resume, --overwrite"
        raise ExistingFileError(f"{folder} holds an unfinished run; pass {ways} or another --out")
    if resume:
        before = json.loads(stored.read_text(encoding="utf-8"))
        if changed := [key for key in settings if settings[key] != before.get(key)]:
            listing = ", ".join(f"{key} was {before.get(key)}, now {settings[key]}" for key in changed)
            raise InputError(f"{folder} cannot be resumed with other settings: {listing}")
    remove_leftovers(folder)
    if not resume:
        for path in (folder / name for name in ("settings.json", RESULTS, *outputs)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        write_json(stored, settings)


def resumable_parts(folder: Path, report: Callable[[], object] = lambda: None) -> Part:
    """A function that computes arrays by name, or reads those that an interrupted run has left in `folder`.

    It calls `report` after each.
    """

    def part(name: str, compute: Callable[[], Arrays]) -> Arrays:
        path = folder / f"{name}.safetensors"
        if first_process_agrees(path.exists()):
            _, arrays = safetensors_io.read(path, _PART)
        else:
            # In the order of the file: BLAS adds up what is transposed in another order.
            arrays = {key: np.asarray(array, order="C") for key, array in compute().items()}
            if is_first_process():
                safetensors_io.write(path, _PART, {}, arrays)
        report()
        return arrays

    return part


def finish_run(folder: Path, results: Any) -> None:
    """Writes the results of a run, then deletes the parts, which only an unfinished run needs."""
    write_json(folder / RESULTS, results)
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def _lock(folder: Path) -> None:
    import fcntl  # not on Windows

    release_run(folder)  # a run of this process that has ended
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _LOCKS[folder.resolve()] = (folder / "run.lock").open("w", encoding="utf-8")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ExistingFileError(f"another process runs in {folder}; wait for its end or choose another --out") from None
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror}") from error


def release_run(folder: Path) -> None:
    """Lets other processes have the folder of a run that has ended; for callers that outlive their runs."""
    if lock := _LOCKS.pop(folder.resolve(), None):
        lock.close()
