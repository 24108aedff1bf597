"""A plan: everything that turns a dense detector into a sparse one, as an object and as a file.

The file is safetensors. Its entries are the arrays of every FFN's selector ("encoder.0.selector.threshold") and the
order of its hidden neurons ("encoder.0.order") where that is not the detector's own; its header says of which classes
the selectors are, how and on what the plan was made, what was measured with it, and which detector it belongs to.
"""

from dataclasses import dataclass
from dataclasses import fields as _fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.kernels import Execution, UnavailableError
from detr_jax.model import DETR, FFNWeights, LowRankFactors, SecondLayer, Selector
from detr_jax.model.ffn import forward
from detr_jax.model.parameters import fingerprint
from detr_jax.sparsity import described_arrays, selectors
from detr_jax.sparsity.described_arrays import Format

FORMAT = Format("detr-jax-plan", 3, "a plan", "scripts/train_gates.py makes one")
_DESCRIBED = ("method", "fingerprint", "training", "measured", "versions")
_CLASSES = {
    cls.__name__: cls
    for cls in (
        *(selectors.Thresholded, selectors.TopK, selectors.Compensated, LowRankFactors, SecondLayer),
        *(selectors.Executed, Execution),
        *(selectors.Oracle, selectors.Sibs),
        *(selectors.Lots, selectors.Importance, selectors.HiddenMagnitude, selectors.InputMagnitude),
        *(
            selectors.LinearGate,
            selectors.LowRankGate,
            selectors.PooledGate,
            selectors.ContributionGate,
            selectors.Sketch,
        ),
        *(selectors.Fixed, selectors.Sectioned),
        *(selectors.Standardised, selectors.ShareOfLargest, selectors.Pooled),
    )
}


@dataclass(frozen=True)
class Plan:
    """How each FFN of one detector is made sparse.

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


def save_plan(plan: Plan, path: Path | str) -> None:
    """Writes a plan; the file appears under its name only once it is whole."""
    arrays = {f"{name}.order": np.asarray(order, np.int32) for name, order in plan.orders.items()}
    structure = {name: _take_apart(s, f"{name}.selector", arrays) for name, s in plan.selectors.items()}
    described = {key: getattr(plan, key) for key in _DESCRIBED} | {"selectors": structure}
    described_arrays.write(Path(path), FORMAT, described, arrays)


def load_plan(path: Path | str, model: DETR) -> Plan:
    """Reads the plan of a detector.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, no plan, of another version, or the plan of another detector.
    """
    path = Path(path)
    described, arrays = described_arrays.read(path, FORMAT)
    expected = {*_DESCRIBED, "selectors"}
    if set(described) != expected:
        raise ValueError(f"{path} is damaged: it describes {sorted(described)}, should be {sorted(expected)}")
    orders = _orders(path, arrays, model)
    plan = Plan(orders=orders, **described | {"selectors": _selectors(path, described["selectors"], arrays, model)})
    if plan.fingerprint != (own := fingerprint(model)):
        raise ValueError(
            f"{path} was made for the detector {plan.fingerprint[:12]}, this one is {own[:12]}: it knows nothing "
            "about other parameters; make one for this detector with scripts/train_gates.py"
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


def _take_apart(part: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    """A selector as JSON; its arrays are put aside under their names."""
    if type(part).__name__ in _CLASSES:
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
    fields = {key: _put_together(value, arrays) for key, value in structure.items() if key != "class"}
    return _CLASSES[structure["class"]](**fields)


def _selectors(
    path: Path, structures: dict[str, Any], arrays: dict[str, np.ndarray], model: DETR
) -> dict[str, Selector]:
    """Takes the selectors out of a file's arrays and tries whether they fit the detector."""
    if not isinstance(structures, dict):
        raise ValueError(f"{path} is damaged: its selectors are a {type(structures).__name__}")
    if unknown := set(structures) - set(model.config.ffn_names):
        raise ValueError(f"{path} has selectors for {sorted(unknown)}; this detector has {model.config.ffn_names}")
    for name, array in arrays.items():
        wrong = np.isnan if name.endswith(".threshold") else lambda values: ~np.isfinite(values)
        if wrong(array).any():
            raise ValueError(f"{path} is damaged: {name} holds NaN or infinite values")
        if name.endswith(".threshold") and array.shape:
            raise ValueError(f"{path} is damaged: {name} has the shape {array.shape}; a threshold is one number")
    try:
        found = {name: _put_together(structures[name], arrays) for name in model.config.ffn_names if name in structures}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r} is missing, unknown or wrong in its selectors") from error
    if arrays:
        raise ValueError(f"{path} is damaged: entries {sorted(arrays)} are left over")
    weights = jax.eval_shape(model.ffn_weights)
    x = jax.ShapeDtypeStruct((1, 2, model.config.d_model), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, 2), bool)
    for name, selector in found.items():
        try:
            kept, _ = jax.eval_shape(partial(_run, selector), weights[name], x, tokens)
            if any(which is not None and which.shape[:-1] != tokens.shape for which in kept):
                raise ValueError("it does not decide token by token")
        except UnavailableError as error:
            raise ValueError(f"{path}: the selector of {name} cannot be computed on this device: {error}") from error
        except (AttributeError, TypeError, ValueError) as error:
            leaves = jax.tree_util.tree_leaves_with_path(selector)
            shapes = {jax.tree_util.keystr(key): np.shape(leaf) for key, leaf in leaves}
            raise ValueError(f"{path}: the selector of {name} has shapes that do not fit its FFN: {shapes}") from error
    return found


def _run(
    selector: Selector, weights: FFNWeights, x: jax.Array, tokens: jax.Array
) -> tuple[tuple[jax.Array | None, jax.Array | None], jax.Array]:
    """The groups and channels that a selector selects for each token, and what the FFN makes of that."""
    selection = selector(weights, x, tokens)
    kept = selection.per_token(tokens.shape, len(weights.w_in)), selection.channels
    return kept, forward(weights, x, selection)
