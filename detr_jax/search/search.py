"""Search for a plan: each FFN stays dense, computes a fixed set of neurons, or a set chosen for each image or window,
by the divergence of the outputs and the run time on this device."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from detr_jax.calibration.activations import ActivationStatistics, measure_activations, require_active
from detr_jax.calibration.allocation import Choice, greedy, undominated
from detr_jax.calibration.moments import measure_kept, measure_moments, measure_pooled
from detr_jax.calibration.permutation import coactivation_permutation
from detr_jax.calibration.sensitivity import OutputDivergence
from detr_jax.calibration.thresholds import collect_scores
from detr_jax.data.batches import CachedBatches
from detr_jax.data.dataset import Dataset
from detr_jax.data.features import BackboneFeatures, backbone_features
from detr_jax.errors import InputError
from detr_jax.kernels import Execution
from detr_jax.methods import Pooled, sketch
from detr_jax.methods.grouping import group_count
from detr_jax.methods.pooled_statistics import fit_pooled_statistics
from detr_jax.models import Detector, Selector
from detr_jax.search.candidates import DYNAMIC, Candidate, Material, candidates_of, reconstructed
from detr_jax.search.timing import measure_times


@dataclass(frozen=True)
class SearchSettings:
    """Candidates of a search, and how they are measured."""

    window: int | None = None
    """Consecutive tokens that share a choice; default all of an image."""
    group_size: int = 1
    """Neurons that are chosen together, by co-activation; what a CPU gathers may be single rows."""
    block_size: int | None = None
    """Neurons that are computed together; default the group size. Kernels for GPUs want 64."""
    rank: int = 16
    """Rank of the sketch of the first product, from which sets are chosen."""
    fixed: tuple[float, ...] = (0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.06, 0.03)
    """Densities of fixed sets to choose from."""
    dynamic: tuple[float, ...] = (0.4, 0.3, 0.2, 0.15, 0.1, 0.06, 0.03, 0.015)
    """Mean densities of chosen sets to choose from; none searches among fixed sets alone."""
    statistics_images: int = 512
    """Training images for statistics."""
    calibration_images: int = 120
    """Held-out training images for thresholds and for the divergence of the outputs."""
    latency_images: int = 16
    """Images of the batch that is timed, all of the most frequent padded shape."""
    batch_size: int = 20
    """Images per batch elsewhere."""
    repeats: int = 15
    """Measured repetitions of each time."""

    def check(self, model: Detector) -> None:
        """Refuses settings that do not fit a detector, before anything is computed.

        Raises:
            InputError: naming the option and the value.
        """
        positive = ("window", "group_size", "block_size", "rank", "statistics_images", "calibration_images")
        for name in (*positive, "latency_images", "batch_size", "repeats"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if wrong := [density for density in (*self.fixed, *self.dynamic) if not 0 < density < 1]:
            raise InputError(f"densities of candidates must be above 0 and below 1, not {wrong[0]}")
        block_size = self.block_size or self.group_size
        if block_size % self.group_size:
            raise InputError(f"--block-size must be a multiple of --group-size {self.group_size}, not {block_size}")
        for weights in model.ffn_weights().values():
            group_count(len(weights.w_in), block_size)


class PlanSearch:
    """The candidates of every FFN with their losses and times, and what can be chosen among them.

    Args:
        model: the detector, in its own order.
        statistics: training images for statistics.
        calibration: held-out training images.
        settings: candidates, and how they are measured.

    Attributes:
        model: the detector in the order in which the candidates were made.
        permutations: (F,) of the detector's own neurons by name, which make that order.
        candidates: of each FFN by name; the first one is dense.
        losses: of each FFN the divergence of the outputs with each of its candidates, the other FFNs being dense.
        seconds: of each FFN the times of its candidates on a batch of calibration images.

    Raises:
        InputError: if no neuron of some FFN is active on the images for statistics.
    """

    def __init__(self, model: Detector, statistics: Dataset, calibration: Dataset, settings: SearchSettings):
        self._settings, self._own, weights = settings, model, model.ffn_weights()
        self.names = tuple(weights)
        sample = CachedBatches([batch.tokens for batch in self._embed(statistics, "embedding images for statistics")])
        self.permutations = {name: np.arange(len(ffn.w_in)) for name, ffn in weights.items()}
        of_neurons = measure_activations(model, sample)
        require_active(of_neurons, statistics.name)
        if settings.group_size > 1:
            self.permutations = {
                name: coactivation_permutation(s.coactive, settings.group_size) for name, s in of_neurons.items()
            }
            of_neurons = {name: s.of_neurons(self.permutations[name]) for name, s in of_neurons.items()}
        self.model = model.with_permutations(self.permutations)

        held_out = self._embed(calibration, "embedding calibration images")
        self._timed = most_frequent_shape(held_out, settings.latency_images)
        self.candidates = self._candidates(of_neurons, sample, held_out)
        self.losses = self._losses(OutputDivergence(self.model, held_out))
        ways = {name: [(c.selector, c.order) for c in of] for name, of in self.candidates.items()}
        self.seconds = self.times(ways, "timing candidates")

    def _embed(self, dataset: Dataset, title: str) -> list[BackboneFeatures]:
        return list(backbone_features(self._own, dataset, self._settings.batch_size, title))

    def _candidates(
        self, statistics: Mapping[str, ActivationStatistics], sample: CachedBatches, held_out: list[BackboneFeatures]
    ) -> dict[str, list[Candidate]]:
        settings, weights = self._settings, self.model.ffn_weights()
        inputs, hidden = measure_moments(self.model, sample)
        size, window = settings.group_size, settings.window
        sketches = {
            name: sketch(weights[name], m.mean, m.covariance, settings.rank, size) for name, m in inputs.items()
        }
        pooled = measure_pooled(self.model, sample, window)
        scores = {
            "sketched": {name: Pooled(of, odds=False, window=window) for name, of in sketches.items()},
            "pooled": {name: fit_pooled_statistics(moments, size, window) for name, moments in pooled.items()},
        }
        calibration = CachedBatches([batch.tokens for batch in held_out])
        decisions = {kind: collect_scores(self.model, calibration, of) for kind, of in scores.items()}
        execution = Execution(window, settings.block_size or size)

        def material(name: str) -> Material:
            of_scores, of_decisions = ({kind: of[name] for kind, of in kinds.items()} for kinds in (scores, decisions))
            return Material(weights[name], statistics[name], hidden[name], of_scores, of_decisions, execution)

        found = {
            name: candidates_of(material(name), settings.fixed, settings.dynamic)
            for name in tqdm(self.names, desc="making candidates", unit="FFN")
        }
        # One pass measures what a candidate of every FFN keeps.
        choosing = {name: [c for c in of if c.kind in DYNAMIC] for name, of in found.items()}
        for turn in tqdm(range(max(map(len, choosing.values()))), desc="reconstructing outputs", unit="candidate"):
            of_turn = {name: of[turn] for name, of in choosing.items() if turn < len(of)}
            kept = measure_kept(self.model, sample, {name: c.trial for name, c in of_turn.items()})
            for name, candidate in of_turn.items():
                found[name].append(reconstructed(candidate, weights[name], kept[name]))
        return found

    def _losses(self, divergence: OutputDivergence) -> dict[str, np.ndarray]:
        total = sum(map(len, self.candidates.values()))
        dense = {name: of[0].trial for name, of in self.candidates.items()}
        with tqdm(total=total, desc="output divergence", unit="candidate") as bar:

            def loss(name: str, candidate: Candidate) -> float:
                bar.update()
                return 0.0 if candidate.kind == "dense" else divergence(dense | {name: candidate.trial})

            return {name: np.array([loss(name, c) for c in of]) for name, of in self.candidates.items()}

    def times(
        self, ways: Mapping[str, Sequence[tuple[Selector | None, np.ndarray]]], title: str
    ) -> dict[str, np.ndarray]:
        """The seconds of some ways to compute each FFN on a batch of calibration images, measured beside each other.

        Args:
            ways: of each FFN by name, selectors, None for the dense FFN, and the orders (F,) of `model`'s neurons that
                they belong to.
            title: of the bar.
        """
        traces = jax.jit(type(self.model).traces)(self.model, self._timed, {})
        weights, repeats = self.model.ffn_weights(), self._settings.repeats
        return {
            name: np.array(measure_times(weights[name], traces[name], *zip(*ways[name], strict=True), repeats))
            for name in tqdm(self.names, desc=title, unit="FFN")
        }

    def choose(self, unit: str, share: float, kinds: Sequence[str]) -> dict[str, int]:
        """The candidate of each FFN that together lose least within a share of what the dense FFNs cost.

        Args:
            unit: "latency" or "density".
            share: of the dense FFNs' cost.
            kinds: of the candidates to choose from.

        Raises:
            ValueError: if no candidates cost so little.
        """
        kept, losses, costs = [], [], []
        for name, cost in self.costs(unit).items():
            allowed = np.array([i for i, c in enumerate(self.candidates[name]) if c.kind in kinds])
            rows = allowed[undominated(self.losses[name][allowed], cost[allowed])]
            kept.append(rows)
            losses.append(self.losses[name][rows])
            costs.append(cost[rows])
        # `greedy` wants as many settings of every FFN.
        longest = max(map(len, kept))
        lost, taken = (np.stack([np.pad(row, (0, longest - len(row)), "edge") for row in of]) for of in (losses, costs))
        choice: Choice = greedy(lost, taken, share)
        return {name: int(rows[min(c, len(rows) - 1)]) for name, rows, c in zip(self.names, kept, choice, strict=True)}

    def costs(self, unit: str) -> dict[str, np.ndarray]:
        """Of each FFN what its candidates cost, as shares of all dense FFNs."""
        if unit == "density":
            return {name: np.array([c.density for c in of]) / len(self.names) for name, of in self.candidates.items()}
        dense = sum(seconds[0] for seconds in self.seconds.values())
        return {name: seconds / dense for name, seconds in self.seconds.items()}

    def cost(self, choice: Mapping[str, int], unit: str) -> float:
        """What a choice costs, as a share of the dense FFNs."""
        return float(sum(self.costs(unit)[name][i] for name, i in choice.items()))

    def choices(self, shares: Sequence[float], kinds: Sequence[str], unit: str = "latency") -> list[dict[str, int]]:
        """Choices for shares of what the dense FFNs cost, as far as there are some that cost so little."""
        costs = self.costs(unit).items()
        least = sum(
            min(cost[i] for i, c in enumerate(self.candidates[name]) if c.kind in kinds) for name, cost in costs
        )
        return [self.choose(unit, share, kinds) for share in shares if share > least]

    def chosen(self, choice: Mapping[str, int]) -> dict[str, Candidate]:
        """The candidates of a choice."""
        return {name: self.candidates[name][i] for name, i in choice.items()}


def most_frequent_shape(batches: Sequence[BackboneFeatures], images: int) -> Any:
    """Backbone features of up to so many images of the shape that most images have, as one batch."""

    def shape(batch: BackboneFeatures) -> tuple:
        return tuple(leaf.shape[1:] for leaf in jax.tree.leaves(batch.tokens))

    counted: Counter = Counter()
    for batch in batches:
        counted[shape(batch)] += int(batch.valid.sum())
    (most, _), *_ = counted.most_common(1)
    alike = [jax.tree.map(lambda leaf, of=of: leaf[of.valid], of.tokens) for of in batches if shape(of) == most]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:images], *alike)
