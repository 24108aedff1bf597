"""Selectors side by side on one frozen detector: every row is measured on the same images in the same way."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from detr_jax.data.features import BackboneFeatures
from detr_jax.evaluation.coco_ap import CocoScores, bootstrap, confidence_interval, score
from detr_jax.evaluation.flops import DenseFlops, remaining_share, sparse_flops
from detr_jax.evaluation.runs import MeasuredDetections, measure_dataset
from detr_jax.methods import Thresholded, Traits
from detr_jax.models import Detector, FFNSpec, Selector

Row = dict[str, Any]
"""What was measured with one set of selectors, as JSON."""


class Comparison:
    """Measures selectors against the dense detector.

    Args:
        embedded: the images behind the backbone.
        ground_truth: of the images, in COCO's layout.
        flops: of the dense detector, for one image.
        group_size: neurons per group, for the counts.
        dense: the detector.

    Attributes:
        image_ids: of the images.
        dense: scores of the dense detector.
    """

    def __init__(
        self,
        embedded: Sequence[BackboneFeatures],
        ground_truth: dict,
        flops: DenseFlops,
        group_size: int,
        dense: Detector,
    ):
        self._embedded, self._ground_truth, self._flops, self._group_size = embedded, ground_truth, flops, group_size
        self.image_ids = [int(i) for batch in embedded for i in batch.image_ids[batch.valid]]
        self.dense = self._score(self.detect(dense, {}))
        self._dense_samples = bootstrap(self.dense)

    def detect(self, model: Detector, selectors: Mapping[str, Selector]) -> MeasuredDetections:
        """What the detector finds and computes with some FFNs sparse.

        Args:
            model: the detector, in whatever order of its hidden neurons.
            selectors: of the sparse FFNs by name.
        """
        return measure_dataset(model, self._embedded, selectors=dict(selectors), group_size=self._group_size)

    def row(self, specs: Mapping[str, FFNSpec], selectors: Mapping[str, Selector], measured: MeasuredDetections) -> Row:
        """Accuracy, density and work with some FFNs sparse; runs beside the detector, in numpy.

        Args:
            specs: of the detector's FFNs by name.
            selectors: that were in effect.
            measured: what `detect` returned.

        Returns:
            COCO's `numbers` and `category_AP`; `AP_interval` and `AP_minus_dense` with its paired
            `AP_minus_dense_interval`, 95 % over images; the means over all FFNs of `density` (of neurons),
            `group_sparsity` and `channel_density`; `flops` and `flops_share` of the `ffns`, the `transformer` and the
            `detector`, the selectors' own work included; `ffns`, the same for each.
        """
        scores = self._score(measured)
        shares, ffns = {}, {}
        for name, counts in measured.counts.items():
            selector, (d, features) = selectors.get(name), (specs[name].d_model, specs[name].hidden)
            traits, cost = (_DENSE, 0.0) if selector is None else (selector.traits, selector.cost(d, features))
            shares[name] = remaining_share(traits, cost, counts, d, features)
            ffns[name] = {
                "threshold": float(selector.threshold) if _is_finite(selector) else None,
                "flops_share": shares[name],
                **{
                    key: getattr(counts, key)
                    for key in ("density", "channel_density", "group_sparsity", "recall", "precision", "zeros")
                },
            }
        flops = sparse_flops(self._flops, shares)
        whole = sparse_flops(self._flops, {})
        return (
            self._numbers(scores)
            | {
                key: float(np.mean([ffn[key] for ffn in ffns.values()]))
                for key in ("density", "channel_density", "group_sparsity", "recall")
            }
            | {
                "flops": flops,
                "flops_share": {part: flops[part] / whole[part] for part in flops},
                "ffns": ffns,
            }
        )

    def _score(self, measured: MeasuredDetections) -> CocoScores:
        return score(self._ground_truth, measured.results, self.image_ids)

    def _numbers(self, scores: CocoScores) -> Row:
        samples = bootstrap(scores)
        return {
            "numbers": scores.numbers,
            "category_AP": scores.category_ap,
            "AP_interval": confidence_interval(samples),
            "AP_minus_dense": scores.numbers["AP"] - self.dense.numbers["AP"],
            # The same images are drawn for every row, so the replicates are pairs.
            "AP_minus_dense_interval": confidence_interval(samples - self._dense_samples),
        }


_DENSE = Traits("nothing", "neuron", "both", dynamic=False)


def _is_finite(selector: Selector | None) -> bool:
    return isinstance(selector, Thresholded) and bool(np.isfinite(selector.threshold))


def describe(selector: Selector) -> Row:
    """What one has to know of a selector beside its numbers."""
    traits: Traits = selector.traits
    return {
        "needs": traits.needs,
        "granularity": traits.granularity,
        "saves": traits.saves,
        "dynamic": traits.dynamic,
        "trained": traits.needs == "training",
    }


def one_at_a_time(selectors: Mapping[str, Selector]) -> dict[str, dict[str, Selector]]:
    """Which FFN costs the accuracy: each alone, then from the first to each, by title."""
    alone = {f"{name} alone": {name: selector} for name, selector in selectors.items()}
    names = list(selectors)
    up_to = {f"up to {name}": {n: selectors[n] for n in names[: i + 1]} for i, name in enumerate(names)}
    return alone | up_to
