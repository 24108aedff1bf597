"""Arrays by name with a description as JSON, in one safetensors file: what plans and statistics are kept as."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from detr_jax.files import replacing


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        name: stands in the file's header.
        version: of the layout; files of another one are refused.
        holds: what the file holds, for errors: "a plan".
        remedy: what to do where there is no file, for errors.
    """

    name: str
    version: int
    holds: str
    remedy: str


def write(path: Path, format: Format, description: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a file; it appears under its name only once it is whole."""
    header = {
        "format": format.name,
        "format_version": str(format.version),
        "description": json.dumps(description, allow_nan=False),
    }
    with replacing(path) as temporary:
        contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        safetensors.numpy.save_file(contiguous, temporary, metadata=header)


def read(path: Path, format: Format) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Description and arrays of a file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or of another format or version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} with {format.holds}; {format.remedy}")
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    if header.get("format") != format.name:
        raise ValueError(f"{path} does not hold {format.holds}: its format is {header.get('format')!r}")
    if header.get("format_version") != str(format.version):
        raise ValueError(
            f"{path} has version {header.get('format_version')!r}; this detr-jax reads version {format.version}"
        )
    try:
        description = json.loads(header["description"])
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: its header has no description ({error!r})") from error
    if not isinstance(description, dict):
        raise ValueError(f"{path} is damaged: its description is a {type(description).__name__}")
    return description, arrays
