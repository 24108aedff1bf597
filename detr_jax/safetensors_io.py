"""Arrays by name with a description as JSON, in one safetensors file: what plans and statistics are kept as."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from detr_jax.errors import InputError, MissingFileError
from detr_jax.files import replacing, to_json

Header = dict[str, str]
Arrays = dict[str, np.ndarray]
Migration = Callable[[Header, Arrays], tuple[Header, Arrays]]
"""Header and arrays of one version of a format -> of the next."""
Part = Callable[[str, Callable[[], Arrays]], Arrays]
"""Computes the arrays of a name, or returns them if they have been computed before."""


@dataclass(frozen=True)
class Format:
    """A kind of file."""

    name: str
    """Stands in the file's header."""
    version: int
    """Of the layout; files of newer ones are refused, and older ones that cannot be migrated."""
    holds: str
    """What the file holds, for errors: "a plan"."""
    remedy: str
    """What to do where there is no file, for errors."""
    migrations: Mapping[int, Migration] = field(default_factory=dict)
    """From an earlier version to the next, by the earlier one."""


def write(path: Path, format: Format, description: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a file; it appears under its name only once it is whole. The same content gives the same bytes."""
    header = {"format": format.name, "format_version": str(format.version), "description": to_json(description)}
    with replacing(path) as temporary:
        write_arrays(temporary, arrays, header)
        _sort_metadata(temporary)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], header: Header) -> None:
    """Writes a safetensors file under the name given and no other.

    `save_file` writes to a name of its own choice beside it, which a killed process leaves behind.
    """
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    path.write_bytes(safetensors.numpy.save(contiguous, metadata=header))


def _sort_metadata(path: Path) -> None:
    """Sorts the metadata in a file's header, which safetensors writes in a random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length))


def read(path: Path, format: Format) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Description and arrays of a file.

    Raises:
        MissingFileError: if there is no such file.
        InputError: if the file is damaged, or of another format or version.
    """
    if not path.is_file():
        raise MissingFileError(f"there is no file {path} with {format.holds}; {format.remedy}")
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from error
    if header.get("format") != format.name:
        raise InputError(f"{path} does not hold {format.holds}: its format is {header.get('format')!r}")
    header, arrays = _migrated(path, format, header, arrays)
    try:
        description = json.loads(header["description"])
    except (KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is damaged: its header has no description ({error!r})") from error
    if not isinstance(description, dict):
        raise InputError(f"{path} is damaged: its description is a {type(description).__name__}")
    return description, arrays


def _migrated(path: Path, format: Format, header: Header, arrays: Arrays) -> tuple[Header, Arrays]:
    """Header and arrays in the present version."""
    found = checked_version(path, header, format.version)
    for version in range(found, format.version):
        if version not in format.migrations:
            raise InputError(f"{path} has format version {found}, which this detr-jax does not read any more")
        try:
            header, arrays = format.migrations[version](header, arrays)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged: it is no version {version} of {format.holds} ({error!r})") from error
    return header, arrays


def checked_version(source: Path | str, header: Header, newest: int) -> int:
    """Version of a file's format by its header; an InputError if there is none or it is newer than `newest`."""
    version = header.get("format_version", "")
    if not version.isdecimal():
        raise InputError(f"{source} is damaged: its format_version is {version!r}, not a number")
    if int(version) > newest:
        raise InputError(f"{source} has format version {version}; this detr-jax reads up to {newest}: update it")
    return int(version)
