"""The folder of a long run: prepared once, gone on with or deleted only when asked."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detr_jax.errors import ExistingFileError, InputError, MissingFileError
from detr_jax.files import remove_leftovers, write_json
from detr_jax.mesh import is_first_process, wait_for_all

RESULTS = "results.json"
"""Written last: a folder that holds it holds a finished run."""


def open_run(folder: Path, settings: dict[str, Any], outputs: Sequence[str], *, resume: bool, overwrite: bool) -> None:
    """Prepares the output folder of a run; only `resume` goes on with one and only `overwrite` deletes one.

    The processes of a job have to see the same folder.

    Args:
        folder: of the run.
        settings: whatever decides what the run computes, as JSON; a resumed run must have the same.
        outputs: names of the files and folders that a run writes into its folder.
        resume: go on with an unfinished run.
        overwrite: delete an earlier run.

    Raises:
        FileExistsError: if there is a run that may neither be resumed nor deleted.
        FileNotFoundError: if there is no run to resume, or the first process' folder is not this one's.
        ValueError: if both are asked for, or the run to resume has other settings.
    """
    settings = json.loads(json.dumps(settings, default=str))
    stored = folder / "settings.json"
    if overwrite and resume:
        raise InputError("--resume keeps the run in the output folder and --overwrite deletes it; choose one")
    if (folder / RESULTS).exists() and not overwrite:
        raise ExistingFileError(f"{folder} holds a finished run; choose another --out or pass --overwrite")
    if stored.exists() and not (overwrite or resume):
        raise ExistingFileError(f"{folder} holds an unfinished run; pass --resume, --overwrite or another --out")
    if resume and not stored.exists():
        raise MissingFileError(f"there is no run in {folder} to resume")
    if resume:
        before = json.loads(stored.read_text())
        if changed := [key for key in settings if settings[key] != before.get(key)]:
            listing = ", ".join(f"{key} was {before.get(key)}, now {settings[key]}" for key in changed)
            raise InputError(f"{folder} cannot be resumed with other settings: {listing}")
    if (resume or overwrite) and is_first_process():
        remove_leftovers(folder)
    if resume:
        return
    wait_for_all("looked into the output folder")
    if is_first_process():
        if overwrite:
            for path in (folder / name for name in ("settings.json", RESULTS, *outputs)):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        write_json(stored, settings)
    wait_for_all("prepared the output folder")
    if not stored.exists():
        raise MissingFileError(
            f"{folder} on this host is not the folder of the job's first process; --out has to be one that all hosts "
            "share, such as an NFS share"
        )
