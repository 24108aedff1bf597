"""A plan: everything that turns a dense detector into a sparse one."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np

from detr_jax.models import Permutations, PlanSelectors, Selectors


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class Plan:
    """How each FFN of one detector is made sparse. A pytree of its selectors; the rest is part of the structure.

    Attributes:
        method: name of the selectors' method, "mgs".
        fingerprint: of the detector it was made for, see `detr_jax.fingerprint`.
        selectors: selector of each sparse FFN by name; the others are dense.
        permutations: (F,) of the hidden neurons of FFNs that are not in the detector's own order, see
            `detr_jax.calibration.permutation`; the selectors belong to `model.with_permutations(permutations)`.
        training: how and on what data the selectors were trained and calibrated, as JSON.
        measured: accuracy and sparsity with this plan, as JSON.
        versions: of the libraries that made it.
    """

    method: str
    fingerprint: str
    selectors: Selectors
    permutations: dict[str, np.ndarray]
    training: dict[str, Any]
    measured: dict[str, Any]
    versions: dict[str, str]

    def __post_init__(self) -> None:
        if isinstance(self.selectors, Mapping):  # not while JAX puts a pytree of something else together
            object.__setattr__(self, "selectors", PlanSelectors(self.selectors, Permutations(self.permutations)))

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any]], "_Facts"]:
        facts = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "selectors"}
        return ((jax.tree_util.GetAttrKey("selectors"), self.selectors),), _Facts(facts)

    @classmethod
    def tree_unflatten(cls, facts: "_Facts", selectors: tuple[Any]) -> "Plan":
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
        own, others = dict(self.values), dict(other.values)
        return same_permutations(own.pop("permutations"), others.pop("permutations")) and own == others


def same_permutations(ones: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]) -> bool:
    """Whether two plans are about the same order of a detector's neurons."""
    same_names = ones.keys() == others.keys()
    return ones is others or (same_names and all(np.array_equal(ones[name], others[name]) for name in ones))
