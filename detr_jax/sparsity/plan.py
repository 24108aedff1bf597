"""A plan: everything that turns a dense detector into a sparse one, as an object and as a file.

The file is safetensors. Its entries are the arrays of every FFN's gate ("encoder.0.kernel", ".bias", ".threshold");
its header says how and on what the plan was made, what was measured with it, and which detector it belongs to.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from detr_jax.files import replacing
from detr_jax.model import DETR
from detr_jax.model.parameters import fingerprint
from detr_jax.sparsity.gates import LinearGate

FORMAT = "detr-jax-plan"
VERSION = 1
_ARRAYS = tuple(field.name for field in dataclasses.fields(LinearGate))


@dataclass(frozen=True)
class Plan:
    """How each FFN of one detector is made sparse.

    Attributes:
        method: name of the selectors' method, "mgs".
        fingerprint: of the detector it was made for, see `detr_jax.fingerprint`.
        gates: gate of each sparse FFN by name; the others are dense. Pass them to a detector as `selectors`.
        training: how and on what data the gates were trained and calibrated, as JSON.
        measured: accuracy and sparsity with this plan, as JSON.
        versions: of the libraries that made it.
    """

    method: str
    fingerprint: str
    gates: dict[str, LinearGate]
    training: dict
    measured: dict
    versions: dict[str, str]


def save_plan(plan: Plan, path: Path) -> None:
    """Writes a plan; the file appears under its name only once it is whole."""
    arrays = {
        f"{name}.{array}": np.asarray(getattr(gate, array)) for name, gate in plan.gates.items() for array in _ARRAYS
    }
    described = {key: getattr(plan, key) for key in ("method", "fingerprint", "training", "measured", "versions")}
    header = {"format": FORMAT, "format_version": str(VERSION), "plan": json.dumps(described, allow_nan=False)}
    with replacing(path) as temporary:
        safetensors.numpy.save_file(arrays, temporary, metadata=header)


def load_plan(path: Path, model: DETR) -> Plan:
    """Reads the plan of a detector.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, no plan, of a newer version, or the plan of another detector.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no plan {path}; scripts/train_gates.py makes one")
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is no plan: its format is {header.get('format')!r}, should be {FORMAT!r}")
    version = header.get("format_version", "")
    if not version.isdecimal() or int(version) > VERSION:
        raise ValueError(f"{path} has plan format version {version!r}; this detr-jax reads up to {VERSION}")
    try:
        described = json.loads(header["plan"])
        plan = Plan(gates=_gates(path, arrays, model), **described)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: its header describes no plan ({error!r})") from error
    if plan.fingerprint != (own := fingerprint(model)):
        raise ValueError(
            f"{path} was made for the detector {plan.fingerprint[:12]}, this one is {own[:12]}: its gates know nothing "
            "about other parameters; train gates for this detector with scripts/train_gates.py"
        )
    return plan


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
