"""Search for a plan: each FFN stays dense, computes a fixed set of neurons, or narrow experts, by the divergence of the
outputs and the run time on this device."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from detr_jax.calibration.activations import measure_activations, require_active
from detr_jax.calibration.allocation import Choice, greedy, undominated
from detr_jax.calibration.inputs import draw_inputs
from detr_jax.calibration.moments import measure_moments
from detr_jax.calibration.sensitivity import OutputDivergence
from detr_jax.data.batches import CachedBatches
from detr_jax.data.dataset import Dataset
from detr_jax.data.features import BackboneFeatures, backbone_features
from detr_jax.errors import InputError
from detr_jax.methods import Experts, FitMaterial
from detr_jax.models import Detector
from detr_jax.search.candidates import Candidate, fixed_sets, narrow_experts
from detr_jax.search.timing import Way, measure_times

MARGIN = 0.1
"""Share of a budget of time that a choice leaves free: timed again, plans take about a tenth longer."""


@dataclass(frozen=True)
class SearchSettings:
    """Candidates of a search, and how they are measured."""

    fixed: tuple[float, ...] = (0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.06, 0.03)
    """Densities of fixed sets to choose from."""
    experts: tuple[float, ...] = (0.15, 0.1, 0.06, 0.04, 0.025)
    """Densities of narrow experts to choose from; none searches among fixed sets alone."""
    experts_per_ffn: int = 16
    """Fewer run faster, more are more accurate at the same density."""
    statistics_images: int = 512
    """Training images that candidates are made from."""
    calibration_images: int = 120
    """Held-out training images for the divergence of the outputs."""
    latency_images: int = 16
    """Images of the batch that is timed, all of the most frequent padded shape."""
    batch_size: int = 20
    """Images per batch elsewhere."""
    repeats: int = 15
    """Measured repetitions of each time."""

    def check(self) -> None:
        """Refuses settings that cannot be used, before anything is computed.

        Raises:
            InputError: naming the option and the value.
        """
        for name in (
            *("experts_per_ffn", "statistics_images", "calibration_images"),
            *("latency_images", "batch_size", "repeats"),
        ):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if wrong := [density for density in (*self.fixed, *self.experts) if not 0 < density < 1]:
            raise InputError(f"densities of candidates must be above 0 and below 1, not {wrong[0]}")


class PlanSearch:
    """The candidates of every FFN with their losses and times, and what can be chosen among them.

    Args:
        model: the detector.
        statistics: training images that candidates are made from.
        calibration: held-out training images.
        settings: candidates, and how they are measured.

    Attributes:
        model: the detector.
        candidates: of each FFN by name; the first one is dense.
        losses: of each FFN the divergence of the outputs with each of its candidates, the other FFNs being dense.
        seconds: of each FFN the times of its candidates on a batch of calibration images, by which they are chosen.
        retimed: the same, measured once more, to be reported: what is chosen for a small time was often measured too
            fast.

    Raises:
        InputError: if no neuron of some FFN is active on the images for statistics.
    """

    def __init__(self, model: Detector, statistics: Dataset, calibration: Dataset, settings: SearchSettings):
        self.model, self._settings = model, settings
        self.names = tuple(model.ffn_weights())
        self.candidates = self._candidates(statistics)
        held_out = self._embed(calibration, "embedding calibration images")
        self._timed = most_frequent_shape(held_out, settings.latency_images)
        self.losses = self._losses(OutputDivergence(model, held_out))
        ways = {name: [(c.selector, c.order) for c in of] for name, of in self.candidates.items()}
        self.seconds = self.times(ways, "timing candidates")
        self.retimed = self.times(ways, "timing candidates again")

    def _embed(self, dataset: Dataset, title: str) -> list[BackboneFeatures]:
        return list(backbone_features(self.model, dataset, self._settings.batch_size, title))

    def _candidates(self, images: Dataset) -> dict[str, list[Candidate]]:
        settings, weights = self._settings, self.model.ffn_weights()
        sample = CachedBatches([batch.tokens for batch in self._embed(images, "embedding images for statistics")])
        statistics = measure_activations(self.model, sample)
        require_active(statistics, images.name)
        _, hidden = measure_moments(self.model, sample)
        method = Experts(experts=settings.experts_per_ffn, images=len(images))
        inputs = draw_inputs(self.model, sample.batches(), method.tokens, method.images, method.seed)
        found = {}
        with tqdm(total=len(weights) * (1 + len(settings.experts)), desc="making candidates", unit="fit") as bar:
            for name in self.names:
                material = FitMaterial(
                    *(weights[name], statistics[name]), hidden_moments=hidden[name], inputs=inputs[name], name=name
                )
                found[name] = fixed_sets(material, settings.fixed)
                bar.update()
                found[name] += narrow_experts(material, settings.experts, method, bar.update)
        return found

    def _losses(self, divergence: OutputDivergence) -> dict[str, np.ndarray]:
        total = sum(map(len, self.candidates.values()))
        dense = {name: of[0].trial for name, of in self.candidates.items()}
        with tqdm(total=total, desc="output divergence", unit="candidate") as bar:

            def loss(name: str, candidate: Candidate) -> float:
                bar.update()
                return 0.0 if candidate.kind == "dense" else divergence(dense | {name: candidate.trial})

            return {name: np.array([loss(name, c) for c in of]) for name, of in self.candidates.items()}

    def times(self, ways: Mapping[str, Sequence[Way]], title: str) -> dict[str, np.ndarray]:
        """The seconds of some ways to compute each FFN, by name, on a batch of calibration images, measured beside each
        other; `title` is that of the bar."""
        traces = jax.jit(type(self.model).traces)(self.model, self._timed, {})
        weights, repeats = self.model.ffn_weights(), self._settings.repeats
        return {
            name: np.array(measure_times(weights[name], traces[name], ways[name], repeats))
            for name in tqdm(self.names, desc=title, unit="FFN")
        }

    def choose(self, unit: str, share: float, kinds: Sequence[str]) -> dict[str, int]:
        """The candidate of each FFN that together lose least within a share of what the dense FFNs cost.

        Args:
            unit: "latency" or "density".
            share: of the dense FFNs' cost; of their time, `MARGIN` of it stays free.
            kinds: of the candidates to choose from.

        Raises:
            ValueError: if no candidates cost so little.
        """
        kept, losses, costs = [], [], []
        share *= 1 - MARGIN if unit == "latency" else 1
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
        return shares_of_dense(self.seconds)

    def cost(self, choice: Mapping[str, int], unit: str) -> float:
        """What a choice costs, as a share of the dense FFNs."""
        return float(sum(self.costs(unit)[name][i] for name, i in choice.items()))

    def time(self, choice: Mapping[str, int]) -> float:
        """The time of a choice as a share of the dense FFNs', by other measurements than it was chosen by."""
        shares = shares_of_dense(self.retimed)
        return float(sum(shares[name][i] for name, i in choice.items()))

    def choices(self, shares: Sequence[float], kinds: Sequence[str], unit: str = "latency") -> list[dict[str, int]]:
        """Choices for shares of what the dense FFNs cost, as far as there are some that cost so little."""
        costs = self.costs(unit).items()
        least = sum(
            min(cost[i] for i, c in enumerate(self.candidates[name]) if c.kind in kinds) for name, cost in costs
        )
        least /= 1 - MARGIN if unit == "latency" else 1
        return [self.choose(unit, share, kinds) for share in shares if share > least]

    def chosen(self, choice: Mapping[str, int]) -> dict[str, Candidate]:
        """The candidates of a choice."""
        return {name: self.candidates[name][i] for name, i in choice.items()}


def shares_of_dense(seconds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Times of each FFN's candidates, of which the first is dense, as shares of all dense FFNs'."""
    dense = sum(of_ffn[0] for of_ffn in seconds.values())
    return {name: of_ffn / dense for name, of_ffn in seconds.items()}


def most_frequent_shape(batches: Sequence[BackboneFeatures], images: int) -> Any:
    """Backbone features of up to so many images of the shape that most images have, as one batch."""

    def shape(batch: BackboneFeatures) -> tuple[tuple[int, ...], ...]:
        return tuple(leaf.shape[1:] for leaf in jax.tree.leaves(batch.tokens))

    counted: Counter[tuple[tuple[int, ...], ...]] = Counter()
    for batch in batches:
        counted[shape(batch)] += int(batch.valid.sum())
    (most, _), *_ = counted.most_common(1)
    alike = [jax.tree.map(lambda leaf, of=of: leaf[of.valid], of.tokens) for of in batches if shape(of) == most]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:images], *alike)
