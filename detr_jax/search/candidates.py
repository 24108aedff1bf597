"""Ways to compute one FFN that a search chooses from: dense, fixed sets of neurons, or narrow experts.

The accuracy of a candidate is measured with a stand-in of the same outputs and density, so that one program serves
all candidates of a kind: a mask for fixed sets, experts padded to one width. Its run time is measured with the selector
that a plan would hold.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from detr_jax.calibration.activations import ActivationStatistics
from detr_jax.calibration.moments import Moments
from detr_jax.kernels import Execution, FFNWeights
from detr_jax.methods import Executed, Experts, FitMaterial, Fixed, PartitionedSelector, RoutedExperts, by_contribution
from detr_jax.methods.base import MethodSelector
from detr_jax.methods.reconstruction import obs_ranking, reconstruct_output
from detr_jax.models import OutputLayer, Selector

CANDIDATE_KINDS = ("dense", "fixed", "fixed, reconstructed", "experts")


@dataclass(frozen=True)
class Candidate:
    """One way to compute one FFN.

    Attributes:
        kind: one of `CANDIDATE_KINDS`.
        density: share of the neurons that a token gets, the mean over tokens of training images.
        trial: stand-in for `selector` with the detector's own order of neurons.
        order: (F,) permutation of the neurons for `selector`.
        selector: the plan's; None for the dense FFN.
    """

    kind: str
    density: float
    trial: MethodSelector
    order: np.ndarray
    selector: Selector | None


@dataclass(frozen=True)
class Material:
    """What the candidates of one FFN are made from, on training images.

    Attributes:
        weights: of the FFN.
        statistics: of its activations.
        hidden: moments of its hidden activations.
        inputs: (tokens, d) of its inputs.
    """

    weights: FFNWeights
    statistics: ActivationStatistics
    hidden: Moments
    inputs: np.ndarray


def fixed_sets(material: Material, densities: Sequence[float]) -> list[Candidate]:
    """The dense FFN, and fixed sets at some densities: of the neurons with the highest contribution, and of those that
    survive elimination, with a reconstructed output layer."""
    weights = material.weights
    features = len(weights.w_in)
    ranked = np.argsort(-np.asarray(by_contribution(material.statistics, weights, 1).importance), kind="stable")
    survivors = obs_ranking(weights, material.hidden)
    everything = Fixed(jnp.ones(features, bool), OutputLayer(weights.w_out, weights.b_out))
    found = [Candidate("dense", 1.0, everything, np.arange(features), None)]
    for density in densities:
        count = max(round(density * features), 1)
        found.append(_fixed(weights, ranked[:count]))
        kept = np.isin(np.arange(features), survivors[:count])
        found.append(_fixed(weights, survivors[:count], reconstruct_output(weights, material.hidden, kept)))
    return found


def _fixed(weights: FFNWeights, neurons: np.ndarray, second: OutputLayer | None = None) -> Candidate:
    features, count = len(weights.w_in), len(neurons)
    kept = np.isin(np.arange(features), neurons)
    order = np.argsort(~kept, kind="stable")
    rows = None if second is None else OutputLayer(second.w_out[order[:count]], second.b_out)
    return Candidate(
        "fixed" if second is None else "fixed, reconstructed",
        count / features,
        Fixed(jnp.asarray(kept), second or OutputLayer(weights.w_out, weights.b_out)),
        order,
        Executed(PartitionedSelector(None, count, 0, rows), Execution()),
    )


def narrow_experts(
    material: Material, densities: Sequence[float], method: Experts, progress: Callable[[], object]
) -> list[Candidate]:
    """Narrow experts at some densities; `progress` is called after each."""
    weights = material.weights
    found: list[RoutedExperts] = []
    for density in densities:
        found += method.at_densities(FitMaterial(weights, inputs=material.inputs), float, (density,))
        progress()
    widest = max((width for selector in found for width in selector.widths), default=0)
    order = np.arange(len(weights.w_in))

    def candidate(selector: RoutedExperts) -> Candidate:
        ids = (material.inputs @ np.asarray(selector.kernel) + np.asarray(selector.bias)).argmax(-1)
        density = float(np.array(selector.widths)[ids].mean()) / len(order)
        return Candidate("experts", density, selector.padded(widest), order, selector)

    return [candidate(selector) for selector in found]
