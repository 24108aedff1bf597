"""A plan: everything that turns a dense detector into a sparse one, as an object and as a file.

The file is safetensors. Its entries are the arrays of every FFN's gate ("encoder.0.kernel", ".bias", ".threshold") and
the order of its hidden neurons (".order") where that is not the detector's own; its header says how and on what the
plan was made, what was measured with it, and which detector it belongs to.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from detr_jax.model import DETR
from detr_jax.model.parameters import fingerprint
from detr_jax.sparsity import described_arrays
from detr_jax.sparsity.described_arrays import Format
from detr_jax.sparsity.gates import LinearGate

FORMAT = Format("detr-jax-plan", 2, "a plan", "scripts/train_gates.py makes one")
_ARRAYS = tuple(field.name for field in dataclasses.fields(LinearGate))
_DESCRIBED = ("method", "fingerprint", "training", "measured", "versions")


@dataclass(frozen=True)
class Plan:
    """How each FFN of one detector is made sparse.

    Attributes:
        method: name of the selectors' method, "mgs".
        fingerprint: of the detector it was made for, see `detr_jax.fingerprint`.
        gates: gate of each sparse FFN by name; the others are dense. Pass them to a detector as `selectors`.
        orders: (F,) of the hidden neurons of FFNs that are not in the detector's own order, see `sparsity.ordering`;
            the gates belong to `reorder(model, orders)`.
        training: how and on what data the gates were trained and calibrated, as JSON.
        measured: accuracy and sparsity with this plan, as JSON.
        versions: of the libraries that made it.
    """

    method: str
    fingerprint: str
    gates: dict[str, LinearGate]
    orders: dict[str, np.ndarray]
    training: dict
    measured: dict
    versions: dict[str, str]


def save_plan(plan: Plan, path: Path) -> None:
    """Writes a plan; the file appears under its name only once it is whole."""
    arrays = {
        f"{name}.{array}": np.asarray(getattr(gate, array)) for name, gate in plan.gates.items() for array in _ARRAYS
    } | {f"{name}.order": np.asarray(order, np.int32) for name, order in plan.orders.items()}
    described_arrays.write(path, FORMAT, {key: getattr(plan, key) for key in _DESCRIBED}, arrays)


def load_plan(path: Path, model: DETR) -> Plan:
    """Reads the plan of a detector.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, no plan, of another version, or the plan of another detector.
    """
    described, arrays = described_arrays.read(path, FORMAT)
    if set(described) != set(_DESCRIBED):
        raise ValueError(f"{path} is damaged: it describes {sorted(described)}, should be {sorted(_DESCRIBED)}")
    plan = Plan(orders=_orders(path, arrays, model), gates=_gates(path, arrays, model), **described)
    if plan.fingerprint != (own := fingerprint(model)):
        raise ValueError(
            f"{path} was made for the detector {plan.fingerprint[:12]}, this one is {own[:12]}: its gates know nothing "
            "about other parameters; train gates for this detector with scripts/train_gates.py"
        )
    return plan


def _orders(path: Path, arrays: dict[str, np.ndarray], model: DETR) -> dict[str, np.ndarray]:
    """Takes the orders out of a file's arrays."""
    neurons = np.arange(model.config.ffn_features)
    orders = {key.removesuffix(".order"): arrays.pop(key) for key in list(arrays) if key.endswith(".order")}
    for name, order in orders.items():
        if name not in model.config.ffn_names or not np.array_equal(np.sort(order, axis=None), neurons):
            raise ValueError(f"{path}: {name}.order does not name each of {len(neurons)} hidden neurons once")
    return orders


def _gates(path: Path, arrays: dict[str, np.ndarray], model: DETR) -> dict[str, LinearGate]:
    config = model.config
    names = {name.rpartition(".")[0] for name in arrays}
    if unknown := names - set(config.ffn_names):
        raise ValueError(f"{path} has gates for {sorted(unknown)}; this detector has the FFNs {config.ffn_names}")
    expected = {f"{name}.{array}" for name in names for array in _ARRAYS}
    if wrong := sorted(expected ^ set(arrays)):
        raise ValueError(f"{path} is damaged: entries {wrong} are missing or left over")
    gates = {}
    for name in config.ffn_names:
        if name not in names:
            continue
        kernel, bias, threshold = (arrays[f"{name}.{array}"] for array in ("kernel", "bias", "threshold"))
        groups = bias.shape[0] if bias.ndim == 1 else 0
        if kernel.shape != (config.d_model, groups) or threshold.shape != () or not groups:
            raise ValueError(
                f"{path}: the gate of {name} has kernel {kernel.shape}, bias {bias.shape} and threshold "
                f"{threshold.shape}; should be ({config.d_model}, groups), (groups,) and ()"
            )
        if config.ffn_features % groups:
            raise ValueError(f"{path}: {groups} groups of {name} do not divide {config.ffn_features} hidden neurons")
        for array in _ARRAYS:
            if not np.isfinite(arrays[f"{name}.{array}"]).all():
                raise ValueError(f"{path} is damaged: {name}.{array} holds NaN or infinite values")
        gates[name] = LinearGate(*(jnp.asarray(a) for a in (kernel, bias, threshold)))
    return gates
