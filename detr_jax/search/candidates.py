"""Ways to compute one FFN that a search chooses from: dense, fixed sets of neurons, or narrow experts.

The accuracy of a candidate is measured with a stand-in of the same outputs and density, so that one program serves
all candidates of a kind: a mask for fixed sets, experts padded to one width. Its run time is measured with the selector
that a plan would hold.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

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


def fixed_sets(material: FitMaterial, densities: Sequence[float]) -> list[Candidate]:
    """The dense FFN, and fixed sets at some densities: of the neurons with the highest contribution, and of those that
    survive elimination, with a reconstructed output layer. `material` has activations and hidden moments."""
    weights, moments = material.weights, material.hidden_moments
    features = len(weights.w_in)
    ranked = np.argsort(-np.asarray(by_contribution(material.activations, weights, 1).importance), kind="stable")
    survivors = obs_ranking(weights, moments)
    everything = Fixed(jnp.ones(features, bool), OutputLayer(weights.w_out, weights.b_out))
    found = [Candidate("dense", 1.0, everything, np.arange(features), None)]
    for density in densities:
        count = max(round(density * features), 1)
        first, lasting = (np.isin(np.arange(features), neurons[:count]) for neurons in (ranked, survivors))
        found.append(_fixed(weights, first))
        found.append(_fixed(weights, lasting, reconstruct_output(weights, moments, lasting)))
    return found


def _fixed(weights: FFNWeights, kept: np.ndarray, second: OutputLayer | None = None) -> Candidate:
    order, count = np.argsort(~kept, kind="stable"), int(kept.sum())
    rows = None if second is None else OutputLayer(second.w_out[order[:count]], second.b_out)
    return Candidate(
        "fixed" if second is None else "fixed, reconstructed",
        float(kept.mean()),
        Fixed(jnp.asarray(kept), second or OutputLayer(weights.w_out, weights.b_out)),
        order,
        Executed(PartitionedSelector(None, count, 0, rows), Execution()),
    )


def narrow_experts(
    material: FitMaterial, densities: Sequence[float], method: Experts, progress: Callable[[], object]
) -> list[Candidate]:
    """Narrow experts at some densities; `material` has inputs, and `progress` is called after each density."""
    found = []
    for selector in method.fits(material, densities):
        found.append(selector)
        progress()
    widest = max((width for selector in found for width in selector.widths), default=0)
    order = np.arange(len(material.weights.w_in))

    def candidate(selector: RoutedExperts) -> Candidate:
        ids = (material.inputs @ np.asarray(selector.kernel) + np.asarray(selector.bias)).argmax(-1)
        density = float(np.array(selector.widths)[ids].mean()) / len(order)
        return Candidate("experts", density, selector.padded(widest), order, selector)

    return [candidate(selector) for selector in found]
