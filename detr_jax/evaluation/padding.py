"""What padding images to a few shapes does to a detector's outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np

from detr_jax.data.classes import with_classes
from detr_jax.data.dataset import Dataset, Json
from detr_jax.evaluation.coco_ap import bootstrap_difference, confidence_interval, score
from detr_jax.evaluation.runs import coco_results, predictions
from detr_jax.models import Detector

if TYPE_CHECKING:
    from detr_jax.sparse import SparseDETR


def padding_effect(model: Detector | SparseDETR, dataset: Dataset, batch_size: int) -> Json:
    """Compares padded batches with images at their exact size, for a detector as it runs.

    Returns:
        The number of `images`; `change`, the maximum and median absolute change of each output (of DETR the logits, and
        the boxes in fractions of the image) and of the detections' scores; `AP` padded and exact, and
        `AP_difference_interval`, the 95 % interval of the difference, both None without annotations.
    """
    dataset, _ = with_classes(dataset, model.labels)
    outputs: dict[str, dict[int, Json]] = {"padded": {}, "exact": {}}
    results: dict[str, list[Json]] = {"padded": [], "exact": []}
    for name in outputs:
        exact = name == "exact"
        for batch, raw, detections, _ in predictions(cast(Detector, model), dataset, batch_size, exact=exact):
            leaves = jax.tree_util.tree_leaves_with_path(raw)
            arrays = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
            arrays |= {"scores": detections.scores}
            results[name] += coco_results(batch, detections)
            for i in np.flatnonzero(batch.valid):
                outputs[name][int(batch.image_ids[i])] = {field: array[i] for field, array in arrays.items()}

    change = {}
    for quantity in arrays:
        padded, own = ([outputs[name][key][quantity] for key in dataset.image_ids()] for name in ("padded", "exact"))
        differences = [np.abs(one - other) for one, other in zip(padded, own, strict=True)]
        change[quantity] = {"max": float(np.max(differences)), "median": float(np.median(differences))}
    report: dict[str, Any] = {"images": len(dataset), "change": change, "AP": None, "AP_difference_interval": None}
    if dataset.has_annotations:
        truth, ids = dataset.ground_truth(), dataset.image_ids()
        scores = {name: score(truth, found, ids) for name, found in results.items()}
        report["AP"] = {name: s.numbers["AP"] for name, s in scores.items()}
        report["AP_difference_interval"] = confidence_interval(bootstrap_difference(scores["padded"], scores["exact"]))
    return report
