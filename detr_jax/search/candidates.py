"""The ways to compute one FFN that a search for a plan chooses from: dense, fixed sets of neurons, or sets by a score.

What a candidate does is tried in the masked reference, where candidates differ in numbers only, so that one program
serves all of them. What it costs is measured with the selector that a plan would hold, whose neurons are in sections:
those that (nearly) every decision wants are always computed, those that (nearly) none wants never, and the score
decides about the others alone.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.calibration.activations import ActivationStatistics
from detr_jax.calibration.moments import CrossMoments, Moments
from detr_jax.calibration.reconstruction import obs_ranking, reconstruct_from_kept, reconstruct_output
from detr_jax.errors import InputError
from detr_jax.kernels import Execution, FFNWeights, expand_groups
from detr_jax.methods import Executed, PartitionedSelector, Thresholded, by_contribution
from detr_jax.methods.base import SharedScore, Traits
from detr_jax.methods.grouping import group_count
from detr_jax.models import OutputLayer, Selection, Selector
from detr_jax.pytrees import pytree

CANDIDATE_KINDS = ("dense", "fixed", "fixed, refitted", "sketched", "sketched, refitted", "pooled", "pooled, refitted")
DYNAMIC = ("sketched", "pooled")
"""Those with a score that decides for each image or window, their second layers not fitted."""
ALWAYS = 0.95
"""Share of the decisions from which on a group is always computed."""
NEVER = 0.005
"""Share of the decisions up to which it never is."""


@pytree
@dataclass(frozen=True)
class Trial:
    """What a candidate computes, whatever its kind; for the masked reference.

    Attributes:
        scores: one of them decides about the groups that are neither always nor never computed.
        which: () int32, the index of that one.
        threshold: () float32.
        always: (F,) bool.
        never: (F,) bool.
        second: of all neurons, the FFN's own where nothing was fitted.
    """

    scores: tuple[SharedScore, ...]
    which: jax.Array
    threshold: jax.Array
    always: jax.Array
    never: jax.Array
    second: OutputLayer

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> Selection:
        scores = jnp.stack([score(ffn, x, tokens) for score in self.scores])[self.which]
        wanted = expand_groups(scores >= self.threshold, len(self.never)) & ~self.never
        return Selection(active=wanted | self.always, second=self.second, tile_size=self.traits.tile_size)

    @property
    def traits(self) -> Traits:
        return self.scores[0].traits

    def cost(self, d_model: int, features: int) -> float:
        """Multiply-adds per token of the decision about the neurons that are neither always nor never computed."""
        gated = int((~np.asarray(self.always) & ~np.asarray(self.never)).sum())
        return self.scores[int(self.which)].cost(d_model, gated) * (gated > 0)


@dataclass(frozen=True)
class Candidate:
    """One way to compute one FFN.

    Attributes:
        kind: one of `CANDIDATE_KINDS`.
        density: share of the neurons that it computes on the calibration images.
        always: share of the neurons that it always computes.
        trial: what it computes, about the detector's neurons in the order in which the candidates were made.
        order: (F,) of those neurons, for the selector.
        selector: what a plan holds; None for the dense FFN.
    """

    kind: str
    density: float
    always: float
    trial: Trial
    order: np.ndarray
    selector: Selector | None


@dataclass(frozen=True)
class Material:
    """What the candidates of one FFN are made from.

    Attributes:
        weights: of the FFN.
        statistics: of its activations on training images.
        hidden: moments of its hidden activations on training images.
        scores: of groups of its neurons, for many tokens at once, by the kinds of `DYNAMIC`.
        decisions: (decisions, G) of each the scores on calibration images.
        execution: how groups are left out; tiles of as many tokens as a decision is about, blocks of whole groups.
    """

    weights: FFNWeights
    statistics: ActivationStatistics
    hidden: Moments
    scores: Mapping[str, SharedScore]
    decisions: Mapping[str, np.ndarray]
    execution: Execution


def candidates_of(material: Material, fixed: Sequence[float], dynamic: Sequence[float]) -> list[Candidate]:
    """The dense FFN; fixed sets of groups by their contribution; fixed sets of neurons by elimination, with a second
    layer fitted to them; and sets of groups that a score chooses.

    Args:
        material: of the FFN.
        fixed: densities of fixed sets.
        dynamic: mean densities of chosen ones; those are left out where a score has nothing to decide about.

    Raises:
        ValueError: if the decisions do not fit the FFN, or a density is not between 0 and 1.
    """
    weights = material.weights
    (groups,) = {of_kind.shape[-1] for of_kind in material.decisions.values()}
    features = len(weights.w_in)
    size = features // group_count(features, features // groups)
    if wrong := [density for density in (*fixed, *dynamic) if not 0 < density < 1]:
        raise InputError(f"densities of candidates must be above 0 and below 1, not {wrong[0]}")
    nothing = np.zeros(groups, bool)
    found = [_candidate(material, "dense", np.inf, ~nothing, nothing)]
    ranked = np.argsort(-np.asarray(by_contribution(material.statistics, weights, size).importance), kind="stable")
    survivors = obs_ranking(weights, material.hidden)
    for density in fixed:
        kept = np.isin(np.arange(groups), ranked[: max(round(density * groups), 1)])
        found.append(_candidate(material, "fixed", np.inf, kept, ~kept))
        kept = np.isin(np.arange(features), survivors[: max(round(density * features), 1)])
        found.append(
            _candidate(
                material, "fixed, refitted", np.inf, kept, ~kept, reconstruct_output(weights, material.hidden, kept)
            )
        )
    for kind, density in itertools.product(material.scores, dynamic):
        decisions = material.decisions[kind]
        threshold = np.quantile(decisions, 1 - density, method="higher").astype(np.float32)
        share = (decisions >= threshold).mean(0)
        always, never = share >= ALWAYS, share <= NEVER
        if not (always | never).all():
            found.append(_candidate(material, kind, threshold, always, never))
    return found


def reconstructed(candidate: Candidate, weights: FFNWeights, moments: CrossMoments) -> Candidate:
    """A candidate that chooses, with a second layer that is fitted to what it computes.

    Args:
        candidate: of a kind of `DYNAMIC`.
        weights: of the FFN.
        moments: of what it keeps, see `training.moments.measure_kept`.
    """
    second = reconstruct_from_kept(weights, moments)
    sectioned = candidate.selector.selector
    rows = second.w_out[candidate.order[: sectioned.always + sectioned.gated]]
    sectioned = dataclasses.replace(sectioned, second=OutputLayer(rows, second.b_out))
    return dataclasses.replace(
        candidate,
        kind=f"{candidate.kind}, refitted",
        trial=dataclasses.replace(candidate.trial, second=second),
        selector=dataclasses.replace(candidate.selector, selector=sectioned),
    )


def _candidate(
    material: Material,
    kind: str,
    threshold: float,
    always: np.ndarray,
    never: np.ndarray,
    second: OutputLayer | None = None,
) -> Candidate:
    """`always` and `never` are about groups; of a refitted set, which has no gated section, about neurons."""
    size = len(material.weights.w_in) // len(always)
    which = list(material.scores).index(kind) if kind in DYNAMIC else 0
    score = list(material.scores.values())[which]
    if kind in DYNAMIC:
        share = (material.decisions[kind] >= threshold).mean(0)
        # Blocks are whole in the section that is decided about: the groups that come closest are taken in.
        missing = -int((~always & ~never).sum()) % max(material.execution.block_size // size, 1)
        out = np.flatnonzero(never)
        never = never & ~np.isin(np.arange(len(always)), out[np.argsort(-share[out], kind="stable")][:missing])
        in_order = np.lexsort((-share, np.where(always, 0, np.where(never, 2, 1))))
    else:
        in_order = np.argsort(never, kind="stable")
    gated = in_order[int(always.sum()) : len(always) - int(never.sum())]
    order = (in_order[:, None] * size + np.arange(size)).ravel()
    per_neuron = [jnp.asarray(np.repeat(section, size)) for section in (always, never)]
    own = OutputLayer(material.weights.w_out, material.weights.b_out)
    second_of_all = own if second is None else second
    trial = Trial(tuple(material.scores.values()), jnp.int32(which), jnp.float32(threshold), *per_neuron, second_of_all)
    selector = None
    if kind != "dense":
        gate = Thresholded(score.of_groups(gated), jnp.float32(threshold)) if len(gated) else None
        rows = None if second is None else OutputLayer(second.w_out[order[: int(always.sum())]], second.b_out)
        selector = Executed(
            PartitionedSelector(gate, int(always.sum()) * size, len(gated) * size, rows), material.execution
        )
    density = float(always.mean() + (share[gated].sum() / len(always) if len(gated) else 0))
    return Candidate(kind, density, float(always.mean()), trial, order, selector)
