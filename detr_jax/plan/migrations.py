"""Plan files of earlier versions, each turned into the next one."""

import json

import numpy as np

from detr_jax.methods import log_odds
from detr_jax.safetensors_io import Arrays, Header, Migration

_GATE = ("kernel", "bias", "threshold")
_PLACES = ("score.kernel", "score.bias", "threshold")


def _from_1(header: Header, arrays: Arrays) -> tuple[Header, Arrays]:
    """Version 2 brought orders of the neurons, and called the description so; before, it was the plan."""
    return {key: value for key, value in header.items() if key != "plan"} | {"description": header["plan"]}, arrays


def _from_2(header: Header, arrays: Arrays) -> tuple[Header, Arrays]:
    """Version 3 describes selectors of any class; before, all were linear gates with probabilities as thresholds."""
    description = json.loads(header["description"])
    gated = {name.rpartition(".")[0] for name in arrays if not name.endswith(".order")}
    migrated = {name: array for name, array in arrays.items() if name.endswith(".order")}
    selectors = {}
    for ffn in sorted(gated):
        names = {entry: f"{ffn}.selector.{place}" for entry, place in zip(_GATE, _PLACES, strict=True)}
        entries = {entry: arrays[f"{ffn}.{entry}"] for entry in _GATE}
        entries["threshold"] = np.float32(log_odds(entries["threshold"].item()))
        migrated |= {names[entry]: array for entry, array in entries.items()}
        kernel, bias, threshold = ({"array": names[entry]} for entry in _GATE)
        score = {"class": "LinearGate", "kernel": kernel, "bias": bias}
        selectors[ffn] = {"class": "Thresholded", "score": score, "threshold": threshold}
    if len(migrated) != len(arrays):
        raise ValueError(f"its entries are {sorted(arrays)}, not {', '.join(_GATE)} and perhaps order of each FFN")
    return header | {"description": json.dumps(description | {"selectors": selectors})}, migrated


MIGRATIONS: dict[int, Migration] = {1: _from_1, 2: _from_2}
