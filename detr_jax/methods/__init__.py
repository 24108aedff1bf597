"""Methods of deciding which part of an FFN is computed for which token; see `detr_jax.methods.base`."""

# ruff: noqa: F401 - everything here is public

from detr_jax.methods.base import (
    METHODS,
    FitMaterial,
    Method,
    Score,
    Thresholded,
    TrainedMethod,
    Traits,
    at_threshold,
    log_odds,
    named,
    prepared,
    register,
    restricted_to,
    storable,
)
from detr_jax.methods.corematching import CoreMatching
from detr_jax.methods.d2dmoe import D2DMoE, ShareOfLargest
from detr_jax.methods.dejavu import DejaVu, LowRankGate
from detr_jax.methods.executed import Executed, computation_of, executed
from detr_jax.methods.experts import Experts, RoutedExperts
from detr_jax.methods.mgs import MGS, PAPER_THRESHOLD, LinearGate, MGSContribution
from detr_jax.methods.oracle import Oracle
from detr_jax.methods.random import Random
from detr_jax.methods.rsparse import MGSRSparse, RSparse
from detr_jax.methods.sibs import SIBS, IndicatorSelector, find_indicators
from detr_jax.methods.sketch import ContributionSketch, Sketch, sketch
from detr_jax.methods.spark import Spark, Standardised
from detr_jax.methods.static import (
    Fixed,
    Importance,
    StaticContribution,
    StaticFiring,
    StaticReconstructed,
    by_activity,
    by_contribution,
)
from detr_jax.methods.teal import HiddenMagnitude, InputMagnitude, TEALHidden, TEALInput
from detr_jax.methods.token_gates import GatedTokens, TokenGates
from detr_jax.methods.topk import LazyNeuron, TopK
from detr_jax.methods.wina import WINAHidden, WINAInput
from detr_jax.methods.wrappers import LowRankCompensation, PartitionedSelector, Pooled, low_rank_factors
