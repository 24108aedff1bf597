"""Writing results: whole or not at all, and never over a finished one unless told to."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def refuse_existing(path: Path, overwrite: bool) -> None:
    """For the beginning of a command, so that it does not compute what it may not write.

    Raises:
        FileExistsError: if the file exists and may not be overwritten.
    """
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name or pass --overwrite")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends well, and is removed when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Deletes what processes that were killed had begun to write into a folder; nobody may be writing into it."""
    for path in folder.glob(".[0-9]*-*"):
        path.unlink()


def write_json(path: Path, values: Any) -> None:
    """Writes JSON for people and programs.

    Raises:
        ValueError: if a number is not finite, which JSON cannot say.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")
