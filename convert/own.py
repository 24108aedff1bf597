"""Our own files: safetensors with NNX state paths as names, and a header that says which detector they hold."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from detr_jax.convert.checkpoint import Checkpoint, Entry, check_preset
from detr_jax.errors import InputError
from detr_jax.files import replacing
from detr_jax.models.registry import ARCHITECTURES, architecture_of, config_from_json
from detr_jax.safetensors_io import checked_version

FORMAT = "detr-jax"
VERSION = 2


def write_checkpoint(path: Path, config: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a detector's arrays by name; the file appears under its name only once it is whole."""
    header = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "architecture": architecture_of(config),
        "config": json.dumps(dataclasses.asdict(config)),
    }
    with replacing(path) as temporary:
        safetensors.numpy.save_file(dict(arrays), temporary, metadata=header)


def own_checkpoint(
    source: str, entries: Mapping[str, Entry], header: dict[str, str], preset: str | None = None
) -> Checkpoint:
    """A checkpoint of a file whose header says that it is ours.

    Raises:
        InputError: if the header is damaged or of a newer version, or the preset contradicts it.
    """
    version = checked_version(source, header, VERSION)
    architecture = header.get("architecture", "detr")  # version 1 knew no other
    if architecture not in ARCHITECTURES:
        raise InputError(f"{source} holds a detector of architecture {architecture!r}; known are {[*ARCHITECTURES]}")
    try:
        config = config_from_json(architecture, json.loads(header["config"]))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{source} is damaged: its header describes no detector ({error!r})") from error
    check_preset(source, config, preset)
    return Checkpoint(source, f"{FORMAT} {version}", config, entries)
