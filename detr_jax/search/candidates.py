"""Ways to compute one FFN that a search chooses from: dense, fixed sets of neurons, or sets chosen by a score.

The accuracy of a candidate is measured in the masked reference, where candidates differ in numbers only, so that one
program serves all of them. Its run time is measured with the selector that a plan would hold, whose neurons are
partitioned: those that (nearly) every decision keeps are always computed, those that (nearly) none keeps never, and
the score decides about the others alone.
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
from detr_jax.kernels import Execution, FFNWeights, expand_groups
from detr_jax.methods import Executed, PartitionedSelector, Thresholded, by_contribution
from detr_jax.methods.base import SharedScore, Traits
from detr_jax.methods.grouping import group_count
from detr_jax.methods.reconstruction import obs_ranking, reconstruct_from_kept, reconstruct_output
from detr_jax.models import OutputLayer, Selection, Selector
from detr_jax.pytrees import pytree

DYNAMIC = ("sketched", "pooled")
"""Kinds with a score that decides for each image or window."""
CANDIDATE_KINDS = ("dense", *(kind + how for kind in ("fixed", *DYNAMIC) for how in ("", ", reconstructed")))
ALWAYS = 0.95
"""Share of the decisions from which on a group is always computed."""
NEVER = 0.005
"""Share of the decisions up to which it never is."""


@pytree
@dataclass(frozen=True)
class Trial:
    """Selector of a candidate of any kind, for the masked reference.

    Attributes:
        scores: one of them decides about the groups that are neither always nor never computed.
        which: () int32, the index of that one.
        threshold: () float32.
        always: (F,) bool.
        never: (F,) bool.
        second: output layer of all neurons, the FFN's own where nothing was reconstructed.
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
        trial: its selector for the masked reference, in the order of neurons in which candidates are made.
        order: (F,) permutation of those neurons for `selector`.
        selector: the plan's selector; None for the dense FFN.
    """

    kind: str
    density: float
    always: float
    trial: Trial
    order: np.ndarray
    selector: Selector | None


@dataclass(frozen=True)
class Material:
    """Inputs for the candidates of one FFN.

    Attributes:
        weights: of the FFN.
        statistics: of its activations on training images.
        hidden: moments of its hidden activations on training images.
        scores: of groups of its neurons, for many tokens at once, by the kinds of `DYNAMIC`.
        decisions: (decisions, G) scores on calibration images, by kind.
        execution: tiles of as many tokens as a decision is about, blocks of whole groups.
    """

    weights: FFNWeights
    statistics: ActivationStatistics
    hidden: Moments
    scores: Mapping[str, SharedScore]
    decisions: Mapping[str, np.ndarray]
    execution: Execution


def candidates_of(material: Material, fixed: Sequence[float], dynamic: Sequence[float]) -> list[Candidate]:
    """The dense FFN; fixed sets of groups by contribution; fixed sets of neurons by OBS ranking, with a reconstructed
    output; and sets of groups that a score chooses.

    Args:
        material: of the FFN.
        fixed: densities of fixed sets.
        dynamic: mean densities of chosen sets, which are left out where a score has nothing to decide about.

    Raises:
        ValueError: if the decisions do not fit the FFN.
    """
    weights = material.weights
    (groups,) = {of_kind.shape[-1] for of_kind in material.decisions.values()}
    features = len(weights.w_in)
    size = features // group_count(features, features // groups)
    nothing = np.zeros(groups, bool)
    found = [_candidate(material, "dense", np.inf, ~nothing, nothing)]
    ranked = np.argsort(-np.asarray(by_contribution(material.statistics, weights, size).importance), kind="stable")
    survivors = obs_ranking(weights, material.hidden)
    for density in fixed:
        kept = np.isin(np.arange(groups), ranked[: max(round(density * groups), 1)])
        found.append(_candidate(material, "fixed", np.inf, kept, ~kept))
        kept = np.isin(np.arange(features), survivors[: max(round(density * features), 1)])
        second = reconstruct_output(weights, material.hidden, kept)
        found.append(_candidate(material, "fixed, reconstructed", np.inf, kept, ~kept, second))
    for kind, density in itertools.product(material.scores, dynamic):
        decisions = material.decisions[kind]
        threshold = np.quantile(decisions, 1 - density, method="higher").astype(np.float32)
        share = (decisions >= threshold).mean(0)
        always, never = share >= ALWAYS, share <= NEVER
        if not (always | never).all():
            found.append(_candidate(material, kind, threshold, always, never))
    return found


def reconstructed(candidate: Candidate, weights: FFNWeights, moments: CrossMoments) -> Candidate:
    """A candidate of a dynamic kind with a reconstructed output.

    Args:
        candidate: of a kind of `DYNAMIC`.
        weights: of the FFN.
        moments: of the activations that it keeps, see `measure_kept`.
    """
    second = reconstruct_from_kept(weights, moments)
    partitioned = candidate.selector.selector
    rows = second.w_out[candidate.order[: partitioned.always + partitioned.gated]]
    partitioned = dataclasses.replace(partitioned, second=OutputLayer(rows, second.b_out))
    return dataclasses.replace(
        candidate,
        kind=f"{candidate.kind}, reconstructed",
        trial=dataclasses.replace(candidate.trial, second=second),
        selector=dataclasses.replace(candidate.selector, selector=partitioned),
    )


def _candidate(
    material: Material,
    kind: str,
    threshold: float,
    always: np.ndarray,
    never: np.ndarray,
    second: OutputLayer | None = None,
) -> Candidate:
    """`always` and `never` are about groups; about neurons for a reconstructed fixed set, whose groups are neurons."""
    size = len(material.weights.w_in) // len(always)
    which = list(material.scores).index(kind) if kind in DYNAMIC else 0
    score = list(material.scores.values())[which]
    if kind in DYNAMIC:
        share = (material.decisions[kind] >= threshold).mean(0)
        # The score decides about whole blocks: the groups that come closest fill the last one.
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
