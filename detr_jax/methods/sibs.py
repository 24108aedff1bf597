"""SIBS, Static Indicator-Based Sparsification (Sedghi et al. 2025, arXiv 2510.09380), as we read it.

The paper calls SIBS a heuristic that predicts inactive neurons from fixed activation patterns, and gives no algorithm
that we could find. This is our reading. A neuron i indicates the neurons that stay silent in at least a share tau of
the cases in which it fires, by a lower confidence bound of that share, so that rare neurons indicate nothing. A greedy
cover picks the K indicators that silence most. At inference these are computed first; neurons that an active one
indicates are left out, and so are neurons that never fire.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.errors import InputError
from detr_jax.kernels import hidden_activations
from detr_jax.methods.base import FitMaterial, Method, Traits, register, storable
from detr_jax.models import FFNWeights, Selection

if TYPE_CHECKING:
    from detr_jax.calibration.activations import ActivationStatistics


@storable
class IndicatorSelector:
    """Indicators and what they silence."""

    traits = Traits("statistics", "neuron", "both")

    indicators: jax.Array
    """(K,) int32, neurons."""
    silenced: jax.Array
    """(K, F) bool, the neurons that each indicator tells to be silent."""
    alive: jax.Array
    """(F,) bool, neurons that have ever fired."""

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> Selection:
        fires = hidden_activations(x, ffn.w_in[self.indicators], ffn.b_in[self.indicators]) > 0
        silent = fires.astype(jnp.float32) @ self.silenced.astype(jnp.float32) > 0
        computed_anyway = jnp.zeros_like(self.alive).at[self.indicators].set(True)
        return Selection(active=(self.alive & ~silent) | computed_anyway)

    def cost(self, d_model: int, features: int) -> float:
        # The indicators' own activations are part of the FFN; 32 bits of their masks are combined in one operation.
        return len(self.indicators) * features / 32


@register
class SIBS(Method):
    """Static Indicator-Based Sparsification."""

    name = "sibs"
    paper = "Sedghi et al. 2025, arXiv 2510.09380"
    decides = "neuron"
    requires = frozenset({"activations"})
    tuned_by = "nothing"

    tau: float = 0.99
    """Least share of an indicator's activations in which an indicated neuron is inactive."""
    indicators: int = 64
    """Indicators per FFN, at most."""

    def fit(self, material: FitMaterial) -> IndicatorSelector:
        return find_indicators(material.activations, tau=self.tau, indicators=self.indicators, name=material.name)


def find_indicators(
    statistics: "ActivationStatistics", *, tau: float, indicators: int, confidence: float = 1.96, name: str = "the FFN"
) -> IndicatorSelector:
    """SIBS for one FFN, with fewer indicators where no other one would silence anything.

    The `confidence` of the lower bound is in standard deviations (Wilson's interval for a share), `name` for errors.

    Raises:
        InputError: if `tau` is no share, or no neuron is active.
    """
    if not 0 < tau <= 1:
        raise InputError(f"tau must be above 0 and at most 1, not {tau}")
    coactive = np.asarray(statistics.coactive, np.float64)
    fired = np.diag(coactive)
    if not fired.any():
        raise InputError(f"{name}: no neuron is active in these statistics; measure them on other images")
    trials = np.maximum(fired, 1)[:, None]
    silent = _lower_bound(1 - coactive / trials, trials, confidence) >= tau
    silent &= (fired > 0)[:, None] & (fired > 0)[None, :]

    # Of the times that i fires, those in which a chosen indicator already silences j; no less than the most of them.
    known = np.zeros_like(coactive)
    chosen: list[int] = []
    for _ in range(indicators):
        gain = np.where(silent, np.maximum(fired[:, None] - known, 0), 0).sum(1)
        gain[chosen] = 0
        best = int(gain.argmax())
        if gain[best] == 0:
            break
        chosen.append(best)
        known = np.maximum(known, np.where(silent[best][None, :], coactive[:, best][:, None], 0))
    index = np.array(chosen, np.int32)
    return IndicatorSelector(jnp.asarray(index), jnp.asarray(silent[index]), jnp.asarray(fired > 0))


def _lower_bound(share: np.ndarray, trials: np.ndarray, deviations: float) -> np.ndarray:
    """Wilson's lower confidence bound of a share that was observed in a number of trials."""
    z = deviations**2 / trials
    return (share + z / 2 - deviations * np.sqrt(share * (1 - share) / trials + z / (4 * trials))) / (1 + z)
