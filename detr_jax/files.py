"""Writing results: whole or not at all, and never over a finished one unless told to."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detr_jax.errors import ExistingFileError, OutputError, UserError

_TEMPORARY = ".detr-jax-unfinished-"
"""Begins the names of files that are being written; their suffix stays, since libraries choose a format by it."""


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raises an ExistingFileError or OutputError, before anything is computed, if a file may or can not be written."""
    if path.exists() and not overwrite:
        raise ExistingFileError(f"{path} exists; choose another name or pass --overwrite")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"{path} cannot be written: it is a folder, or {folder} is none or may not be written to")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends well, and is removed when not.

    Raises:
        OutputError: if the file cannot be written: no space, no permission.
    """
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise OutputError(f"{path} cannot be written: {error}") from error


def remove_leftovers(folder: Path) -> None:
    """Deletes what killed processes had begun to write into a folder or below it; nobody may be writing there."""
    for path in folder.rglob(f"{_TEMPORARY}*"):
        path.unlink()


def write_json(path: Path, values: Any) -> None:
    """Writes JSON for people and programs, see `to_json`."""
    with replacing(path) as temporary:
        temporary.write_text(to_json(values, indent=2) + "\n", encoding="utf-8")


def to_json(values: Any, indent: int | None = None) -> str:
    """JSON in which undefined numbers (NaN) are null.

    Raises:
        ValueError: if a number is infinite.
    """
    return json.dumps(_null_for_nan(values), indent=indent, allow_nan=False)


def _null_for_nan(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _null_for_nan(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_null_for_nan(value) for value in values]
    return None if isinstance(values, float) and math.isnan(values) else values
