"""Opening checkpoints: files and folders in any of the layouts."""

import argparse
import codecs
import json
import pathlib
import pickle
import re
from dataclasses import dataclass
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

_WHOLE = ("model.safetensors", "pytorch_model.bin")
_TORCH = (".pth", ".pt", ".bin", ".ckpt")


def open_checkpoint(path: Path, preset: str | None = None, facts: Facts | None = None) -> Checkpoint:
    """A checkpoint in a recognised layout, whose arrays are read later; arguments and errors as for `detr_jax.load`.

    `facts` are used instead of those in the files beside the weights.
    """
    if not path.exists():
        raise MissingFileError(f"there is no checkpoint {path}")
    files = _files_of(path) if path.is_dir() else [path]
    entries: dict[str, Entry] = {}
    arguments: dict[str, Any] = {}
    for file in files:
        if file.suffix == ".safetensors":
            arrays, header = _read_safetensors(file)
            if header.get("format") == FORMAT:
                return own_checkpoint(str(path), arrays, header, preset)
        elif file.suffix in _TORCH:
            arrays, arguments = _read_torch(file)
        else:
            raise InputError(f"{path} is neither a folder nor a .safetensors, {', '.join(_TORCH)} file")
        entries |= arrays
    facts = facts or read_facts(files[0].parent)
    if arguments:
        facts = official_facts(path, arguments, facts)
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


def _files_of(folder: Path) -> list[Path]:
    """The file of weights in a Hugging Face folder, or its shards; safetensors where there are torch's too."""
    for name in _WHOLE:
        if (folder / name).exists():
            return [folder / name]
        if (index := folder / f"{name}.index.json").exists():
            break
    else:
        present = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise MissingFileError(f"{folder} holds neither {' nor '.join(_WHOLE)}, whole or in shards; it holds {present}")
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is no index of shards: {error!r}") from error
    if absent := [shard for shard in shards if not (folder / shard).exists()]:
        raise MissingFileError(f"{index} names {', '.join(absent)}, but {folder} does not hold it")
    return [folder / shard for shard in shards]


def _read_torch(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Entries of a file that torch wrote, and the arguments of the official training script if it holds them.

    The tensors are at the top, or where DETR's training script (`model`) or Lightning (`state_dict`) puts them.
    """
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
    content = checkpoint if isinstance(checkpoint, dict) else {}
    state = content.get("model", content.get("state_dict", content))
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(
            f"{path} is no checkpoint of a detector: it must hold a dictionary of tensors, or one under 'model' or "
            "'state_dict'"
        )
    arguments = content.get("args")
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    entries = {name: value.detach() for name, value in state.items()}
    arrays: dict[str, Entry] = {n: (v.float() if v.is_floating_point() else v).numpy() for n, v in entries.items()}
    return arrays, arguments if isinstance(arguments, dict) else {}


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
    return f"{path} is damaged or cut short, or no file of torch: {' '.join(reason.split()) or 'it ends too early'}"
