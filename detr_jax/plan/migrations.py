"""Plan files of earlier versions, each turned into the next one."""

import json
from typing import Any

import numpy as np

from detr_jax.methods import log_odds
from detr_jax.safetensors_io import Arrays, Header, Migration

_RENAMED = {
    "Compensated": "LowRankCompensation",
    "Lots": "Random",
    "SecondLayer": "OutputLayer",
    "Sectioned": "PartitionedSelector",
    "Sibs": "IndicatorSelector",
}
"""Classes of version 3 by their names in version 4."""
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
        entries["threshold"] = np.array(log_odds(entries["threshold"].item()), np.float32)
        migrated |= {names[entry]: array for entry, array in entries.items()}
        kernel, bias, threshold = ({"array": names[entry]} for entry in _GATE)
        score = {"class": "LinearGate", "kernel": kernel, "bias": bias}
        selectors[ffn] = {"class": "Thresholded", "score": score, "threshold": threshold}
    if len(migrated) != len(arrays):
        raise ValueError(f"its entries are {sorted(arrays)}, not {', '.join(_GATE)} and perhaps order of each FFN")
    return header | {"description": json.dumps(description | {"selectors": selectors})}, migrated


def _from_3(header: Header, arrays: Arrays) -> tuple[Header, Arrays]:
    """Version 4 has the terms of the field for orders of neurons and for some classes."""
    description = json.loads(header["description"])
    renamed = {name.removesuffix(".order") + ".permutation" * name.endswith(".order"): a for name, a in arrays.items()}
    if isinstance(description, dict) and "selectors" in description:
        description["selectors"] = _with_new_names(description["selectors"])
    return header | {"description": json.dumps(description)}, renamed


def _with_new_names(structure: Any) -> Any:
    if not isinstance(structure, dict):
        return structure
    named = {key: _with_new_names(value) for key, value in structure.items()}
    return named | {"class": _RENAMED.get(named["class"], named["class"])} if "class" in named else named


MIGRATIONS: dict[int, Migration] = {1: _from_1, 2: _from_2, 3: _from_3}
