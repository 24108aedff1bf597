"""Opening checkpoints: files and folders in any of the layouts."""

import argparse
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from detr_jax.convert.checkpoint import Checkpoint, Entry
from detr_jax.convert.layouts import Shape
from detr_jax.convert.own import FORMAT, own_checkpoint
from detr_jax.convert.published import Facts, published_checkpoint, read_hugging_face_config
from detr_jax.errors import InputError, MissingDependencyError, MissingFileError

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


def open_checkpoint(path: Path, preset: str | None = None) -> Checkpoint:
    """Opens a checkpoint and recognises what it is; arrays are read later.

    Args:
        path: an official `.pth`, a safetensors file of Hugging Face's DETR or of detr-jax, or a folder that holds
            `model.safetensors` or its shards, and Hugging Face's `config.json` if it has one.
        preset: name of the preset whose architecture it has; needed where the file cannot tell DC5.

    Raises:
        FileNotFoundError: if there is no such file or folder, or the folder holds no safetensors.
        ImportError: if a `.pth` is to be read and torch is not installed.
        ValueError: if the file is damaged or no detector of a known layout, or the preset contradicts it.
    """
    if path.is_dir():
        entries, header = _read_folder(path)
        facts = read_hugging_face_config(path / CONFIG) if (path / CONFIG).exists() else Facts()
    elif not path.exists():
        raise MissingFileError(f"there is no checkpoint {path}")
    elif path.suffix == ".safetensors":
        entries, header = _read_safetensors(path)
        facts = Facts()
    elif path.suffix in (".pth", ".pt"):
        (entries, facts), header = _read_official(path), {}
    else:
        raise InputError(f"{path} is neither a folder nor a .safetensors, .pth or .pt file")
    if header.get("format") == FORMAT:
        return own_checkpoint(str(path), entries, header, preset)
    return published_checkpoint(str(path), entries, preset, facts)


@dataclass(frozen=True)
class _Stored:
    """An array that is read from its safetensors file when it is looked at."""

    file: Any
    name: str
    shape: Shape

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.file.get_tensor(self.name), dtype)


def _read_safetensors(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and the header's own values."""
    try:
        file = safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is damaged or cut short, or no safetensors file: {error}") from error
    names = file.keys()
    entries = {name: _Stored(file, name, tuple(file.get_slice(name).get_shape())) for name in names}
    return entries, file.metadata() or {}


def _read_folder(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    if (path / SINGLE).exists():
        return _read_safetensors(path / SINGLE)
    if not (path / INDEX).exists():
        present = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
        raise MissingFileError(f"{path} holds neither {SINGLE} nor {INDEX}; it holds {present}")
    try:
        shards = sorted(set(json.loads((path / INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path / INDEX} is no index of safetensors files: {error!r}") from error
    if absent := [shard for shard in shards if not (path / shard).exists()]:
        raise MissingFileError(f"{path / INDEX} names {', '.join(absent)}, but {path} does not hold it")
    entries: dict[str, Entry] = {}
    for shard in shards:
        entries |= _read_safetensors(path / shard)[0]
    return entries, {}


def _read_official(path: Path) -> tuple[Mapping[str, Entry], Facts]:
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(f"reading {path} needs torch: pip install 'detr-jax[torch]'") from error
    try:
        # The official training script stores its arguments beside the model.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise InputError(f"{path} is damaged or cut short, or holds more than tensors: {reason}") from error
    state = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path} is no official checkpoint: it must hold a dictionary of tensors under 'model'")
    arguments = vars(checkpoint.get("args", argparse.Namespace()))
    entries = {name: (value.float() if value.is_floating_point() else value).numpy() for name, value in state.items()}
    heads = arguments.get("nheads")
    return entries, Facts(dilation=arguments.get("dilation"), encoder_heads=heads, decoder_heads=heads)
