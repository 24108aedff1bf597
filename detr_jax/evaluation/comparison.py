"""Selectors side by side on one frozen detector: every row is measured on the same images in the same way."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from detr_jax.data.dataset import Dataset
from detr_jax.data.features import BackboneFeatures
from detr_jax.evaluation.coco_ap import CocoScores, bootstrap, confidence_interval, score
from detr_jax.evaluation.flops import mean_dense_flops, remaining_share, sparse_flops
from detr_jax.evaluation.runs import MeasuredDetections, measure_dataset
from detr_jax.methods import Thresholded, Traits
from detr_jax.models import Detector, Selectors

Row = dict[str, Any]
"""Measurements with one set of selectors, as JSON."""
MEANS = ("density", "channel_density", "group_sparsity", "recall")
"""Properties of `ActivityCounts` of which a row has the means over the FFNs."""
_DENSE = Traits("nothing", "neuron", "both", dynamic=False)


class Comparison:
    """Measures selectors against the dense detector.

    Args:
        model: the detector.
        dataset: the images.
        features: of the images.
        group_size: neurons per group, for the counts.

    Attributes:
        image_ids: of the images.
        flops: of the dense detector, mean over the images.
        dense: scores of the dense detector.
    """

    def __init__(self, model: Detector, dataset: Dataset, features: Sequence[BackboneFeatures], group_size: int):
        self._features, self._ground_truth, self._group_size = features, dataset.ground_truth(), group_size
        self._specs, self.flops = model.ffn_specs(), mean_dense_flops(model, dataset.image_sizes())
        self.image_ids = [int(i) for batch in features for i in batch.image_ids[batch.valid]]
        self.dense = self._score(self.detect(model, {}))
        self._dense_samples = bootstrap(self.dense)

    def detect(self, model: Detector, selectors: Selectors) -> MeasuredDetections:
        """Detections and activity with some FFNs sparse; `model` has its hidden neurons in whatever order."""
        return measure_dataset(model, self._features, selectors=selectors, group_size=self._group_size)

    def row(self, selectors: Selectors, measured: MeasuredDetections) -> Row:
        """Accuracy, density and work from what `detect` returned for `selectors`, in numpy.

        Returns:
            COCO's `numbers` and `category_AP`; `AP_interval` and `AP_minus_dense` with its paired
            `AP_minus_dense_interval`, 95 % over images; the means over all FFNs of `density` (of neurons),
            `group_sparsity` and `channel_density`; `flops` and `flops_share` of the `ffns`, the `transformer` and the
            `detector`, the selectors' own work included; `ffns`, the same for each.
        """
        scores = self._score(measured)
        samples = bootstrap(scores)
        ffns = {}
        for name, counts in measured.counts.items():
            selector: Any = selectors.get(name)
            d, features = self._specs[name].d_model, self._specs[name].hidden
            traits, cost = (_DENSE, 0.0) if selector is None else (selector.traits, selector.cost(d, features))
            finite = isinstance(selector, Thresholded) and np.isfinite(selector.threshold)
            ffns[name] = {
                "threshold": float(selector.threshold) if finite else None,
                "flops_share": remaining_share(traits, cost, counts, d, features),
                **{key: getattr(counts, key) for key in (*MEANS, "precision", "zeros")},
            }
        flops = sparse_flops(self.flops, {name: ffn["flops_share"] for name, ffn in ffns.items()})
        whole = sparse_flops(self.flops, {})
        return {
            "numbers": scores.numbers,
            "category_AP": scores.category_ap,
            "AP_interval": confidence_interval(samples),
            "AP_minus_dense": scores.numbers["AP"] - self.dense.numbers["AP"],
            # The same images are drawn for every row, so the replicates are pairs.
            "AP_minus_dense_interval": confidence_interval(samples - self._dense_samples),
            **{key: float(np.mean([ffn[key] for ffn in ffns.values()])) for key in MEANS},
            "flops": flops,
            "flops_share": {part: flops[part] / whole[part] for part in flops},
            "ffns": ffns,
        }

    def _score(self, measured: MeasuredDetections) -> CocoScores:
        return score(self._ground_truth, measured.results, self.image_ids)
