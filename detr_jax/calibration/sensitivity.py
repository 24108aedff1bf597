"""Divergence of a detector's outputs, and the loss of each FFN at each density."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from detr_jax.data.features import BackboneFeatures
from detr_jax.mesh import mesh_of, replicate_like, shard_batch, to_host
from detr_jax.models import Detector, Outputs, Selector, Selectors


@jax.jit
def _outputs(model: Detector, tokens: Any, selectors: Selectors) -> Outputs:
    return model.transform(tokens, selectors=selectors)


@jax.jit
def output_divergence(model: Detector, dense: Outputs, sparse: Outputs) -> jax.Array:
    """(batch,) `Detector.divergence`, compiled."""
    return model.divergence(dense, sparse)


class OutputDivergence:
    """Divergence of a detector's outputs with selectors from the dense ones, on images with given backbone features.

    Devices that the detector was replicated over share every batch, see `detr_jax.mesh`.
    """

    def __init__(self, model: Detector, embedded: Sequence[BackboneFeatures]):
        self._model, self._mesh, self._embedded = model, mesh_of(model), embedded
        self._dense = [_outputs(model, shard_batch(self._mesh, batch.tokens), {}) for batch in embedded]

    def __call__(self, selectors: Mapping[str, Selector]) -> float:
        """The mean over images of `Detector.divergence`."""
        changes, selectors = [], replicate_like(self._model, dict(selectors))
        for batch, dense in zip(self._embedded, self._dense, strict=True):
            sparse = _outputs(self._model, shard_batch(self._mesh, batch.tokens), selectors)
            changes.append(to_host(output_divergence(self._model, dense, sparse))[batch.valid])
        return float(np.concatenate(changes).mean())


@dataclass(frozen=True)
class SensitivityTable:
    """One method at several densities in each FFN, the others dense."""

    names: tuple[str, ...]
    """Of the FFNs."""
    densities: np.ndarray
    """(settings,) targets, from 1, which is dense, to the sparsest."""
    settings: tuple[Sequence[Selector], ...]
    """Of each FFN its selector at each density."""
    losses: np.ndarray
    """(FFNs, settings) change of the outputs."""

    @property
    def density_costs(self) -> np.ndarray:
        """(FFNs, settings) for `greedy`: the densities, as shares of what all FFNs compute dense."""
        return np.broadcast_to(self.densities / len(self.names), self.losses.shape)

    def selectors(self, choice: Sequence[int]) -> dict[str, Selector]:
        """The selectors of an allocation, see `detr_jax.calibration.allocation`."""
        return {name: row[c] for name, row, c in zip(self.names, self.settings, choice, strict=True)}


def layer_sensitivity(
    change: OutputDivergence, densities: Sequence[float], settings: Mapping[str, Sequence[Selector]]
) -> SensitivityTable:
    """Measures what each density costs in each FFN; raises a ValueError if the densities do not fall from 1.

    `settings` are, of each FFN by name, its selector at each density, alike but for their numbers: dense FFNs run with
    the selectors of density 1, so that one program serves all settings.
    """
    grid = np.array(densities)
    if not len(grid) or grid[0] != 1 or (np.diff(grid) >= 0).any() or grid[-1] < 0:
        raise ValueError(f"densities must fall from 1 to at least 0, not {list(densities)}")
    table = SensitivityTable(tuple(settings), grid, tuple(settings.values()), np.zeros((len(settings), len(grid))))
    for i, setting in itertools.product(range(len(settings)), range(1, len(grid))):
        choice = [0] * len(settings)
        choice[i] = setting
        table.losses[i, setting] = change(table.selectors(choice))
    return table
