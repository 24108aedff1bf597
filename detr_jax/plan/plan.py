"""A plan: everything that turns a dense detector into a sparse one, as an object and as a file.

The file is safetensors. Its entries are the arrays of every FFN's selector ("encoder.0.selector.threshold") and the
order of its hidden neurons ("encoder.0.order") where that is not the detector's own; its header says of which classes
the selectors are, how and on what the plan was made, what was measured with it, and which detector it belongs to.
"""

import tempfile
from dataclasses import dataclass
from dataclasses import fields as _fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax import hub, safetensors_io
from detr_jax.errors import InputError
from detr_jax.methods.base import STORABLE
from detr_jax.models import Detector, Selector
from detr_jax.models.parameters import fingerprint
from detr_jax.plan.checks import check_fit
from detr_jax.plan.migrations import MIGRATIONS
from detr_jax.safetensors_io import Format
from detr_jax.weights import EMBEDDED, plan_file

FORMAT = Format("detr-jax-plan", 3, "a plan", "scripts/train_gates.py makes one", MIGRATIONS)
FILENAME = "plan.safetensors"
"""Of a plan in a repository on the hub, or in the folder of a detector."""
_DESCRIBED = ("method", "fingerprint", "training", "measured", "versions")
_RENAMED = {
    "Sectioned": "PartitionedSelector",
    "Compensated": "LowRankCompensation",
    "SecondLayer": "OutputLayer",
    "Sibs": "IndicatorSelector",
    "Lots": "Random",
}


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class Plan:
    """How each FFN of one detector is made sparse. A pytree of its selectors; the rest is part of the structure.

    Attributes:
        method: name of the selectors' method, "mgs".
        fingerprint: of the detector it was made for, see `detr_jax.fingerprint`.
        selectors: selector of each sparse FFN by name; the others are dense.
        orders: (F,) of the hidden neurons of FFNs that are not in the detector's own order, see `sparsity.ordering`;
            the selectors belong to `reorder(model, orders)`.
        training: how and on what data the selectors were trained and calibrated, as JSON.
        measured: accuracy and sparsity with this plan, as JSON.
        versions: of the libraries that made it.
    """

    method: str
    fingerprint: str
    selectors: dict[str, Selector]
    orders: dict[str, np.ndarray]
    training: dict
    measured: dict
    versions: dict[str, str]

    def tree_flatten_with_keys(self):
        facts = {field.name: getattr(self, field.name) for field in _fields(self) if field.name != "selectors"}
        return ((jax.tree_util.GetAttrKey("selectors"), self.selectors),), _Facts(facts)

    @classmethod
    def tree_unflatten(cls, facts, selectors):
        return cls(**facts.values, selectors=selectors[0])


class _Facts:
    """What of a plan is no pytree, compared by value: equal facts are the same program for `jax.jit`."""

    def __init__(self, values: dict[str, Any]):
        self.values = values

    def __hash__(self) -> int:
        return hash((self.values["method"], self.values["fingerprint"]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Facts):
            return NotImplemented
        own, others = self.values | {"orders": None}, other.values | {"orders": None}
        orders, other_orders = self.values["orders"], other.values["orders"]
        if orders is other_orders:
            return own == others
        same_orders = orders.keys() == other_orders.keys() and all(
            np.array_equal(order, other_orders[name]) for name, order in orders.items()
        )
        return same_orders and own == others


def save_plan(plan: Plan, path: Path | str) -> None:
    """Writes a plan; the file appears under its name only once it is whole."""
    arrays = {f"{name}.order": np.asarray(order, np.int32) for name, order in plan.orders.items()}
    structure = {name: _take_apart(s, f"{name}.selector", arrays) for name, s in plan.selectors.items()}
    described = {key: getattr(plan, key) for key in _DESCRIBED} | {"selectors": structure}
    safetensors_io.write(Path(path), FORMAT, described, arrays)


def load_plan(name_or_path: Path | str, model: Detector, *, revision: str | None = None) -> Plan:
    """Reads the plan of a detector.

    Args:
        name_or_path: a file, a folder that holds a `plan.safetensors`, the id of a repository on the Hugging Face
            hub that holds one, or "detr-tiny" for the plan that comes with the package.
        model: the detector that it was made for, in its own order.
        revision: commit, branch or tag of the repository.

    Raises:
        FileNotFoundError: if there is no such file, or it can neither be downloaded nor is in the hub's cache.
        ValueError: if the file is damaged, no plan, of a newer version, or the plan of another detector.
    """
    path = Path(name_or_path)
    if str(name_or_path) == EMBEDDED:
        with plan_file() as path:
            return _read(path, model)
    if path.is_dir():
        path = path / FILENAME
    elif not path.exists() and hub.is_id(name_or_path):
        path = hub.download(str(name_or_path), revision, filename=FILENAME, remedy="pass the path of a plan")
    return _read(path, model)


def push_plan(plan: Plan, repository: str, *, private: bool = False, message: str = "Plan of detr-jax") -> str:
    """Puts a plan into a repository on the Hugging Face hub, as its `plan.safetensors`, where `load_plan` finds it.

    Args:
        plan: the plan.
        repository: "owner/name"; made if it does not exist.
        private: who may see it, if it is made.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: if that is no id of a repository.
        OSError: if the hub cannot be reached or refuses; mostly because nobody is logged in.
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
    orders = {key.removesuffix(".order"): arrays.pop(key) for key in list(arrays) if key.endswith(".order")}
    try:
        found = {name: _put_together(structure, arrays) for name, structure in described["selectors"].items()}
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error!r} is missing or wrong in its selectors") from error
    except ValueError as error:
        raise InputError(f"{path} has a selector {error}") from error
    if arrays:
        raise InputError(f"{path} is damaged: entries {sorted(arrays)} are left over")
    plan = Plan(orders=orders, **described | {"selectors": found})
    check_fit(plan.selectors, plan.orders, model, str(path))
    if plan.fingerprint != (own := fingerprint(model)):
        raise InputError(
            f"{path} was made for the detector {plan.fingerprint[:12]}, this one is {own[:12]}: it knows nothing "
            "about other parameters; make one for this detector with scripts/train_gates.py"
        )
    return plan


def _take_apart(part: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    """A selector as JSON; its arrays are put aside under their names."""
    if type(part).__name__ in STORABLE:
        fields = part._asdict() if hasattr(part, "_asdict") else {f.name: getattr(part, f.name) for f in _fields(part)}
        return {"class": type(part).__name__} | {
            key: _take_apart(value, f"{name}.{key}", arrays) for key, value in fields.items()
        }
    if part is None or isinstance(part, bool | int | str):
        return part
    arrays[name] = np.asarray(part)
    return {"array": name}


def _put_together(structure: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Inverse of `_take_apart`; takes the arrays out."""
    if not isinstance(structure, dict):
        return structure
    if "array" in structure:
        return jnp.asarray(arrays.pop(structure["array"]))
    if (name := _RENAMED.get(structure["class"], structure["class"])) not in STORABLE:
        raise InputError(f"of the class {name!r}, which this detr-jax does not know: update it")
    fields = {key: _put_together(value, arrays) for key, value in structure.items() if key != "class"}
    return STORABLE[name](**fields)
