"""Every method's answer to one question: which part of an FFN is computed for which token."""

from detr_jax.methods.base import Score, Thresholded, Traits, at_threshold
from detr_jax.methods.derived import Pooled, ShareOfLargest, Standardised
from detr_jax.methods.executed import Executed, executed
from detr_jax.methods.gates import Gate, LinearGate, LowRankGate, log_odds
from detr_jax.methods.magnitude import HiddenMagnitude, InputMagnitude
from detr_jax.methods.oracle import Oracle
from detr_jax.methods.partitioned import PartitionedSelector
from detr_jax.methods.pooled_gate import ContributionGate, PooledGate
from detr_jax.methods.pooled_statistics import PooledStatistics, fit_pooled_statistics
from detr_jax.methods.random import Lots
from detr_jax.methods.rsparse import LowRankCompensation, low_rank_factors
from detr_jax.methods.sibs import Sibs, find_indicators
from detr_jax.methods.sketch import Sketch, sketch
from detr_jax.methods.static import Fixed, Importance, by_contribution, by_firing
from detr_jax.methods.topk import TopK

__all__ = [
    "ContributionGate",
    "Executed",
    "Fixed",
    "Gate",
    "HiddenMagnitude",
    "Importance",
    "InputMagnitude",
    "LinearGate",
    "Lots",
    "LowRankCompensation",
    "LowRankGate",
    "Oracle",
    "PartitionedSelector",
    "Pooled",
    "PooledGate",
    "PooledStatistics",
    "Score",
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
