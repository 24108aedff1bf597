"""Plans as files.

A file is safetensors. Its entries are the arrays of every FFN's selector ("encoder.0.selector.threshold") and the
permutation of its hidden neurons ("encoder.0.permutation") where they are not in the detector's own order; its header
names the selectors' classes, how and on what the plan was made, what was measured with it, and its detector.
"""

import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from detr_jax import hub, safetensors_io
from detr_jax.errors import ExistingFileError, InputError
from detr_jax.methods.base import STORABLE
from detr_jax.models import Detector
from detr_jax.models.parameters import fingerprint
from detr_jax.plan.checks import check_plan
from detr_jax.plan.migrations import MIGRATIONS
from detr_jax.plan.plan import Plan
from detr_jax.safetensors_io import Format
from detr_jax.weights import EMBEDDED, plan_file

FORMAT = Format("detr-jax-plan", 4, "a plan", "scripts/train_gates.py makes one", MIGRATIONS)
FILENAME = "plan.safetensors"
"""Of a plan in a repository on the hub, or in the folder of a detector."""
_DESCRIBED = ("method", "fingerprint", "training", "measured", "versions")


def save_plan(plan: Plan, path: Path | str, overwrite: bool = False) -> None:
    """Writes a plan; the file appears under its name only once it is whole.

    Raises:
        ExistingFileError: if there is a file already that `overwrite` does not allow to replace.
        OutputError: if it cannot be written.
    """
    if not overwrite and Path(path).exists():
        raise ExistingFileError(f"{path} exists; save the plan under another name or pass overwrite=True")
    arrays = {f"{name}.permutation": np.asarray(p, np.int32) for name, p in plan.permutations.items()}
    structure = {name: _take_apart(s, f"{name}.selector", arrays) for name, s in plan.selectors.items()}
    described = {key: getattr(plan, key) for key in _DESCRIBED} | {"selectors": structure}
    safetensors_io.write(Path(path), FORMAT, described, arrays)


def load_plan(name_or_path: Path | str, model: Detector, *, revision: str | None = None) -> Plan:
    """Reads the plan of a detector.

    Args:
        name_or_path: a file, a folder that holds a `plan.safetensors`, the id of a repository on the Hugging Face
            hub that holds one, or "detr-tiny" or "deformable-tiny" for the plan that comes with the package.
        model: the detector that it was made for, in its own order.
        revision: commit, branch or tag of the repository.

    Raises:
        FileNotFoundError: if there is no such file, or it can neither be downloaded nor is in the hub's cache.
        ValueError: if the file is damaged, no plan, of a newer version, or the plan of another detector.
    """
    path = Path(name_or_path)
    if (name := str(name_or_path)) in EMBEDDED:
        with plan_file(name) as path:
            return _read(path, model)
    if path.is_dir():
        path = path / FILENAME
    elif not path.exists() and hub.is_id(name_or_path):
        path = hub.download(str(name_or_path), revision, filename=FILENAME, remedy="pass the path of a plan")
    return _read(path, model)


def push_plan(plan: Plan, repository: str, *, private: bool = False, message: str = "Plan of detr-jax") -> str:
    """Puts a plan into a repository on the Hugging Face hub, as its `plan.safetensors`, where `load_plan` finds it.

    The repository, "owner/name", is made if it does not exist, for its owner alone if `private`. Returns the address of
    the commit.

    Raises:
        InputError: if that is no id of a repository.
        OutputError: if the hub cannot be reached or refuses; mostly because nobody is logged in.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILENAME
        save_plan(plan, path)
        return hub.upload(path, repository, FILENAME, private=private, message=message)


def _read(path: Path, model: Detector) -> Plan:
    described, arrays = safetensors_io.read(path, FORMAT)
    expected = {*_DESCRIBED, "selectors"}
    if set(described) != expected:
        raise InputError(f"{path} is damaged: it describes {sorted(described)}, should be {sorted(expected)}")
    if not isinstance(described["selectors"], dict):
        raise InputError(f"{path} is damaged: its selectors are a {type(described['selectors']).__name__}")
    suffix = ".permutation"
    permutations = {key.removesuffix(suffix): arrays.pop(key) for key in list(arrays) if key.endswith(suffix)}
    try:
        found = {name: _put_together(structure, arrays) for name, structure in described["selectors"].items()}
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error!r} is missing or wrong in its selectors") from error
    except ValueError as error:
        raise InputError(f"{path} has a selector {error}") from error
    if arrays:
        raise InputError(f"{path} is damaged: entries {sorted(arrays)} are left over")
    plan = Plan(permutations=permutations, **described | {"selectors": found})
    check_plan(plan, model, fingerprint(model), str(path))
    return plan


def _take_apart(part: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    """A selector as JSON; its arrays are put aside under their names."""
    if type(part).__name__ in STORABLE:
        # Derived fields are made again for the detector that the plan is used with.
        kept = () if hasattr(part, "_asdict") else (f.name for f in fields(part) if not f.metadata.get("derived"))
        values = part._asdict() if hasattr(part, "_asdict") else {name: getattr(part, name) for name in kept}
        return {"class": type(part).__name__} | {
            key: _take_apart(value, f"{name}.{key}", arrays) for key, value in values.items()
        }
    if part is None or isinstance(part, bool | int | float | str):
        return part
    if isinstance(part, tuple):
        return [_take_apart(value, f"{name}.{i}", arrays) for i, value in enumerate(part)]
    arrays[name] = np.asarray(part)
    return {"array": name}


def _put_together(structure: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Inverse of `_take_apart`; takes the arrays out."""
    if isinstance(structure, list):
        return tuple(_put_together(part, arrays) for part in structure)
    if not isinstance(structure, dict):
        return structure
    if "array" in structure:
        return jnp.asarray(arrays.pop(structure["array"]))
    if (name := structure["class"]) not in STORABLE:
        raise InputError(f"of the class {name!r}, which this detr-jax does not know: update it")
    return STORABLE[name](**{key: _put_together(value, arrays) for key, value in structure.items() if key != "class"})
