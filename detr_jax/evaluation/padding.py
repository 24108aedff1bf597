"""What padding images to a few shapes does to a detector's outputs."""

import numpy as np

from detr_jax.data.dataset import Dataset
from detr_jax.evaluation.coco_ap import bootstrap_difference, confidence_interval, score
from detr_jax.evaluation.runs import coco_results, predictions
from detr_jax.models import DETR


def padding_effect(model: DETR, dataset: Dataset, batch_size: int) -> dict:
    """Compares padded batches with images at their exact size.

    Returns:
        `images`, their number; `change`, of the logits, the boxes (fractions of the image) and the detections'
        scores the maximum and median absolute change; `AP` padded and exact, and the 95 % interval of the difference.
    """
    ground_truth = dataset.ground_truth()
    outputs, scores = {}, {}
    for name, exact in (("padded", False), ("exact", True)):
        by_image, results = {}, []
        for batch, raw, detections in predictions(model, dataset, batch_size, exact=exact):
            results += coco_results(batch, detections)
            for i in np.flatnonzero(batch.valid):
                by_image[int(batch.image_ids[i])] = (raw.logits[i], raw.boxes[i], detections.scores[i])
        outputs[name] = by_image
        scores[name] = score(ground_truth, results, dataset.image_ids())

    change = {}
    for i, quantity in enumerate(("logits", "boxes", "scores")):
        differences = [np.abs(outputs["padded"][key][i] - outputs["exact"][key][i]) for key in dataset.image_ids()]
        change[quantity] = {"max": float(np.max(differences)), "median": float(np.median(differences))}
    return {
        "images": len(dataset),
        "change": change,
        "AP": {name: s.numbers["AP"] for name, s in scores.items()},
        "AP_difference_interval": confidence_interval(bootstrap_difference(scores["padded"], scores["exact"])),
    }
