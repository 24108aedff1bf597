"""Opening checkpoints: files and folders in any of the layouts."""

import argparse
import codecs
import json
import pathlib
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy._core import multiarray

from detr_jax.convert.checkpoint import FORMAT, Checkpoint, Entry, own_checkpoint
from detr_jax.convert.facts import Facts, official_facts, read_facts
from detr_jax.convert.layouts import Shape
from detr_jax.convert.published import published_checkpoint
from detr_jax.errors import InputError, MissingDependencyError, MissingFileError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def open_checkpoint(path: Path, preset: str | None = None, labels: tuple[str, ...] | None = None) -> Checkpoint:
    """A checkpoint in a recognised layout, whose arrays are read later; arguments and errors as for `detr_jax.load`.

    `labels` are class names for where nothing in the files tells them.
    """
    if not path.exists():
        raise MissingFileError(f"there is no checkpoint {path}")
    entries: Mapping[str, Entry]
    if path.is_dir() or path.suffix == ".safetensors":
        entries, header = _read_folder(path) if path.is_dir() else _read_safetensors(path)
        if header.get("format") == FORMAT:
            return own_checkpoint(str(path), entries, header, preset)
        facts = read_facts(path if path.is_dir() else path.parent)
    elif path.suffix in (".pth", ".pt"):
        entries, facts = _read_official(path, read_facts(path.parent))
    else:
        raise InputError(f"{path} is neither a folder nor a .safetensors, .pth or .pt file")
    if facts.labels is None:
        facts = replace(facts, labels=labels)
    return published_checkpoint(str(path), entries, preset, facts)


@dataclass(frozen=True)
class _Stored:
    """An array that is read from its safetensors file when it is used."""

    file: Any
    name: str
    shape: Shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.file.get_tensor(self.name), dtype)


def _read_safetensors(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and metadata."""
    try:
        file = safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is damaged or cut short, or no safetensors file: {error}") from error
    names = file.keys()
    entries: dict[str, Entry] = {name: _Stored(file, name, tuple(file.get_slice(name).get_shape())) for name in names}
    return entries, file.metadata() or {}


def _read_folder(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    if (path / SINGLE).exists():
        return _read_safetensors(path / SINGLE)
    if not (path / INDEX).exists():
        present = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
        raise MissingFileError(f"{path} holds neither {SINGLE} nor {INDEX}; it holds {present}")
    try:
        shards = sorted(set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path / INDEX} is no index of safetensors files: {error!r}") from error
    if absent := [shard for shard in shards if not (path / shard).exists()]:
        raise MissingFileError(f"{path / INDEX} names {', '.join(absent)}, but {path} does not hold it")
    entries: dict[str, Entry] = {}
    for shard in shards:
        entries |= _read_safetensors(path / shard)[0]
    return entries, {}


def _read_official(path: Path, beside: Facts) -> tuple[Mapping[str, Entry], Facts]:
    """Entries and facts of an official `.pth` or a fork's; `beside` are the facts from the files beside it."""
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(f"reading {path} needs torch: pip install 'detr-jax[torch]'") from error
    try:
        # Training scripts store their arguments beside the model, and some of them metrics and paths.
        with torch.serialization.safe_globals(_harmless()):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(_torch_problem(path, str(error))) from error
    state = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path} is no official checkpoint: it must hold a dictionary of tensors under 'model'")
    arguments = checkpoint.get("args")
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    facts = official_facts(path, arguments if isinstance(arguments, dict) else {}, beside)
    entries = {name: value.detach() for name, value in state.items()}
    return {name: (v.float() if v.is_floating_point() else v).numpy() for name, v in entries.items()}, facts


def _harmless() -> list[Any]:
    """Types beside the tensors that are made without running code of a file."""
    scalars = {type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"}
    made = [multiarray.scalar, multiarray._reconstruct]
    # Files of NumPy 1 name the modules as they were.
    renamed = [(make, f"numpy.core.multiarray.{make.__name__}") for make in made]
    paths = [pathlib.PosixPath, pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.WindowsPath]
    return [argparse.Namespace, codecs.encode, np.dtype, np.ndarray, *made, *renamed, *scalars, *paths]


def _torch_problem(path: Path, message: str) -> str:
    message = re.sub(r"\x1b\[[0-9;]*m", "", message)
    if culprit := re.search(r"GLOBAL (\S+)", message):
        return (
            f"{path} holds a {culprit[1]} beside its tensors, which could run code while it is read. If you trust the "
            f"file, keep its tensors only: state = torch.load({path.name!r}, map_location='cpu', weights_only=False); "
            "torch.save({'model': state['model']}, 'tensors.pth')"
        )
    # torch frames the reason with advice to load the file unsafely.
    reason = re.sub(r".*WeightsUnpickler error:|Check the documentation of torch\.load.*", "", message, flags=re.DOTALL)
    return f"{path} is damaged or cut short: {' '.join(reason.split()) or 'it ends too early'}"
