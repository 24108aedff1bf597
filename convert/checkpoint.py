"""An opened checkpoint: a configuration, and entries that fill our arrays one by one; and files of our own.

These are safetensors with NNX state paths as names, and a header that says which detector they hold.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from detr_jax.convert.layouts import SAME, Place, Shape
from detr_jax.errors import InputError
from detr_jax.files import replacing
from detr_jax.models import preset_config
from detr_jax.models.registry import ARCHITECTURES, architecture_of, config_from_json
from detr_jax.safetensors_io import Header, checked_version, write_arrays

FORMAT = "detr-jax"
VERSION = 2
FINE_TUNED = ("labels", "queries", "preprocessing")
"""Fields that training on other data may change."""


class Entry(Protocol):
    """An array that may still lie in its file."""

    @property
    def shape(self) -> Shape: ...

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray: ...


def length_of(entries: Mapping[str, Entry], name: str, default: int) -> int:
    """Length of an entry; the default leaves it to the checkpoint to report one that is missing or has no axes."""
    entry = entries.get(name)
    return entry.shape[0] if entry is not None and entry.shape else default


@dataclass(frozen=True)
class Checkpoint:
    """A detector in some layout, checked and converted as it is read.

    Attributes:
        source: the file or folder, for messages.
        layout: name of the layout.
        config: of the detector, of an architecture in the registry.
        entries: the arrays under the names of the layout.
        places: where each of our arrays is; None where the names are ours.
    """

    source: str
    layout: str
    config: Any
    entries: Mapping[str, Entry]
    places: tuple[Place, ...] | None = None

    def arrays(self, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, np.ndarray]]:
        """Our arrays by name, float32, each read when it is asked for; `shapes` are those of all of the detector's.

        Raises:
            InputError: if entries are missing, left over or misshapen, or hold NaN or infinite values.
        """
        parts: dict[str, list[Place]] = {}
        for place in self.places or [Place(name, name, SAME) for name in shapes]:
            parts.setdefault(place.theirs, []).append(place)
        self._check(parts, shapes)
        for name, places in parts.items():
            entry = np.asarray(self.entries[name]).astype(np.float32, copy=False)
            if not np.isfinite(entry).all():
                raise InputError(f"{self.source} is damaged: {name} holds NaN or infinite values")
            for place, array in zip(places, np.split(entry, len(places)) if len(places) > 1 else [entry], strict=True):
                yield place.ours, place.form.convert(array, shapes[place.ours])

    def _check(self, parts: Mapping[str, list[Place]], shapes: Mapping[str, Shape]) -> None:
        expected = {}
        for name, places in parts.items():
            rows, *rest = places[0].form.shape(shapes[places[0].ours])
            expected[name] = (len(places) * rows, *rest)
        found = {name: tuple(entry.shape) for name, entry in self.entries.items()}
        problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
        problems += [f"left over: {name} {shape}" for name, shape in found.items() if name not in expected]
        misshapen = [name for name, shape in expected.items() if found.get(name, shape) != shape]
        problems += [f"misshapen: {name} is {found[name]}, should be {expected[name]}" for name in misshapen]
        if problems:
            listing = "\n  ".join(problems)
            raise InputError(f"{self.source} ({self.layout}) does not fit its configuration:\n  {listing}")


def check_preset(source: str, config: Any, preset: str | None) -> None:
    """Raises an InputError if a configuration is not of a preset's architecture, or there is no such preset."""
    if preset is None:
        return
    described = preset_config(preset)
    if type(config) is not type(described):
        raise InputError(f"{source} is not a {preset}: it is a {type(config).__name__}")
    found, wanted = (dataclasses.asdict(one) for one in (config, described))
    found, wanted = found.pop("backbone") | found, wanted.pop("backbone") | wanted
    names = [name for name in wanted if name not in FINE_TUNED and found[name] != wanted[name]]
    if differing := [f"{name} is {found[name]}, not {wanted[name]}" for name in names]:
        raise InputError(f"{source} is not a {preset}: {'; '.join(differing)}")


def write_checkpoint(path: Path, config: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a detector's arrays by name; the file appears under its name only once it is whole."""
    header = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "architecture": architecture_of(config),
        "config": json.dumps(dataclasses.asdict(config)),
    }
    with replacing(path) as temporary:
        write_arrays(temporary, arrays, header)


def own_checkpoint(source: str, entries: Mapping[str, Entry], header: Header, preset: str | None) -> Checkpoint:
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
