"""Every method's answer to one question: which part of an FFN is computed for which token."""

from detr_jax.sparsity.selectors.derived import Pooled, ShareOfLargest, Standardised
from detr_jax.sparsity.selectors.executed import Executed, executed
from detr_jax.sparsity.selectors.gates import Gate, LinearGate, LowRankGate, log_odds
from detr_jax.sparsity.selectors.magnitude import HiddenMagnitude, InputMagnitude
from detr_jax.sparsity.selectors.oracle import Oracle
from detr_jax.sparsity.selectors.pooled_gate import ContributionGate, PooledGate
from detr_jax.sparsity.selectors.pooled_statistics import PooledStatistics, fit_pooled_statistics
from detr_jax.sparsity.selectors.random import Lots
from detr_jax.sparsity.selectors.rsparse import Compensated, low_rank_factors
from detr_jax.sparsity.selectors.score import Score, Thresholded, Traits, at_threshold
from detr_jax.sparsity.selectors.sectioned import Sectioned
from detr_jax.sparsity.selectors.sibs import Sibs, find_indicators
from detr_jax.sparsity.selectors.sketch import Sketch, sketch
from detr_jax.sparsity.selectors.static import Fixed, Importance, by_contribution, by_firing
from detr_jax.sparsity.selectors.topk import TopK

__all__ = [
    "Compensated",
    "ContributionGate",
    "Executed",
    "Fixed",
    "Gate",
    "HiddenMagnitude",
    "Importance",
    "InputMagnitude",
    "LinearGate",
    "Lots",
    "LowRankGate",
    "Oracle",
    "Pooled",
    "PooledGate",
    "PooledStatistics",
    "Score",
    "Sectioned",
    "ShareOfLargest",
    "Sibs",
    "Sketch",
    "Standardised",
    "Thresholded",
    "TopK",
    "Traits",
    "at_threshold",
    "by_contribution",
    "by_firing",
    "executed",
    "find_indicators",
    "fit_pooled_statistics",
    "log_odds",
    "low_rank_factors",
    "sketch",
]
