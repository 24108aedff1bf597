"""COCO's average precision by pycocotools, and its confidence intervals by resampling images."""

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_jax.data.dataset import Json
from detr_jax.errors import InputError

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""COCO's twelve numbers: mean over IoU .50 to .95 unless a threshold is named; s, m, l are object sizes, numbers
after AR are detections per image."""
REPLICATES = 2000
"""Draws of the images for a confidence interval."""
PART = 1 << 18
"""Detections times draws that are computed at once."""


@dataclass(frozen=True)
class CategoryMatches:
    """Detections of one category over all images, best first.

    Attributes:
        image: (detections,) int, index of the image.
        hit: (IoU thresholds, detections) bool, matched an object.
        miss: (IoU thresholds, detections) bool, matched nothing; those on crowds are neither hit nor miss.
        objects: (images,) int, objects to be found in each image.
    """

    image: np.ndarray
    hit: np.ndarray
    miss: np.ndarray
    objects: np.ndarray


@dataclass(frozen=True)
class CocoScores:
    """Accuracy of detections.

    Attributes:
        numbers: the twelve `METRICS`; NaN where no object defines one.
        category_ap: AP of every category with objects, by name; where several categories share a name, by "name (id)".
        image_ids: ids of the images, sorted.
        matches: for resampling, one for every category with objects.
    """

    numbers: dict[str, float]
    category_ap: dict[str, float]
    image_ids: tuple[int, ...]
    matches: tuple[CategoryMatches, ...]


def score(ground_truth: Json, results: list[Json], image_ids: Sequence[int]) -> CocoScores:
    """Accuracy of detections in some images, of which those without objects or detections count too.

    `ground_truth` is in the layout of COCO's `instances_*.json`, `results` in its results format, with boxes (x, y,
    width, height) in pixels.

    Raises:
        InputError: if there are no images.
        ValueError: if a result belongs to an image that is not in the ground truth.
    """
    if not len(image_ids):
        raise InputError("there are no images to evaluate")
    known = {image["id"] for image in ground_truth["images"]}
    if unknown := {result["image_id"] for result in results} - known:
        raise ValueError(f"there are results for image {min(unknown)}, which is not in the ground truth")
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_index(ground_truth, ground_truth["annotations"]), _index(ground_truth, results), "bbox")
        evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()

    categories, images = evaluation.params.catIds, evaluation.params.imgIds
    # evalImgs runs over categories, areas, images; the first area is "all".
    shape = (len(categories), len(evaluation.params.areaRng), len(images))
    per_category = np.array(evaluation.evalImgs, object).reshape(shape)[:, 0]
    matches = {c: _matches(entries) for c, entries in zip(categories, per_category, strict=True) if entries.any()}
    matches = {c: m for c, m in matches.items() if m.objects.any()}
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    times, once = Counter(names.values()), np.ones(len(images), np.int32)
    return CocoScores(
        # pycocotools has -1 where there is nothing to find.
        numbers={name: float(x) if x >= 0 else np.nan for name, x in zip(METRICS, evaluation.stats, strict=True)},
        category_ap={
            names[c] + (f" ({c})" if times[names[c]] > 1 else ""): float(category_ap(m, once))
            for c, m in matches.items()
        },
        image_ids=tuple(int(i) for i in images),
        matches=tuple(matches.values()),
    )


def require_usable_ap(scores: CocoScores, least: float = 0.01) -> float:
    """AP of a dense detector, for a budget in AP; an InputError if it is undefined or below `least`."""
    ap = scores.numbers["AP"]
    if np.isnan(ap):
        raise InputError("AP is undefined on these images, which have no annotated objects: take a budget without AP")
    if ap < least:
        raise InputError(
            f"the dense detector has an AP of {ap:.3f} on these images, so a loss of AP says nothing: do its classes "
            "belong to the data's categories, and are its images like the data's?"
        )
    return ap


def shown(value: float | None, spec: str = ".3f") -> str:
    """A number for people, a dash where it is undefined.

    >>> shown(0.25), shown(float("nan")), shown(None, "6.2f")
    ('0.250', '-', '     -')
    """
    if value is None or np.isnan(value):
        return "-".rjust(int(spec.lstrip("+").partition(".")[0] or 1))
    return format(value, spec)


def category_ap(matches: CategoryMatches, weights: np.ndarray) -> np.ndarray:
    """(...,) AP of one category when image i counts `weights[..., i]` times, a whole number; NaN if no object is left.

    Equal to `COCOeval.accumulate` on repeated images, but for the order among equal scores: the repetitions of one
    detection are consecutive, and the envelope of precision does not see points inside such a run.
    """
    objects = (weights @ matches.objects)[..., None]
    repeated = weights[..., matches.image]
    counted, totals = None, repeated
    per_threshold = []
    for hit, miss in zip(matches.hit, matches.miss, strict=True):
        # Without crowds every detection counts at all thresholds.
        if counted is None or not np.array_equal(counted, hit | miss):
            counted = hit | miss
            totals = np.cumsum(repeated * counted, axis=-1, dtype=np.float64)
        # Only at a hit recall rises, and precision is highest there.
        at = np.flatnonzero(hit)
        hits = np.cumsum(repeated[..., at], axis=-1, dtype=np.float64)
        precision = hits / (totals[..., at] + np.spacing(1))
        envelope = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]
        # How many of the recalls are first reached at each hit; those that are never reached have precision 0.
        recall = np.divide(hits, objects, out=np.zeros_like(hits), where=objects > 0)
        reached = np.searchsorted(_RECALLS, recall, side="right")
        per_threshold.append((envelope * np.diff(reached, prepend=0, axis=-1)).sum(-1) / len(_RECALLS))
    return np.where(objects[..., 0] > 0, np.mean(per_threshold, axis=0), np.nan)


def bootstrap(scores: CocoScores, replicates: int = REPLICATES, seed: int = 0) -> np.ndarray:
    """(replicates,) AP of the same detections on images drawn with replacement; NaN for a draw without any object.

    The draws depend on the seed and the number of images only, so replicates of two detectors on the same images can be
    subtracted.

    Raises:
        InputError: if `replicates` is not positive.
    """
    if replicates < 1:
        raise InputError(f"a bootstrap needs at least one replicate, not {replicates}")
    images = len(scores.image_ids)
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), replicates).astype(np.int32)

    def of_category(matches: CategoryMatches) -> np.ndarray:
        # A few draws at a time, because each takes numbers for every detection.
        parts = np.array_split(draws, min(replicates, -(-replicates * len(matches.image) // PART) or 1))
        return np.concatenate([category_ap(matches, part) for part in parts])

    with ThreadPoolExecutor() as pool:
        per_category = list(pool.map(of_category, scores.matches))  # numpy computes outside of Python's lock
    samples = np.array(per_category).reshape(-1, replicates).T
    defined = ~np.isnan(samples)
    return np.where(defined, samples, 0).sum(1) / np.where(defined.any(1), defined.sum(1), np.nan)


def confidence_interval(samples: np.ndarray) -> tuple[float, float]:
    """The central 95 % of bootstrap replicates of an AP or a difference of two; NaN if all are."""
    if np.isnan(samples).all():
        return np.nan, np.nan
    low, high = np.nanquantile(samples, [(1 - 0.95) / 2, (1 + 0.95) / 2])
    return float(low), float(high)


def bootstrap_difference(a: CocoScores, b: CocoScores, replicates: int = REPLICATES, seed: int = 0) -> np.ndarray:
    """(replicates,) AP of `a` minus AP of `b`, both on the same drawn images.

    Raises:
        ValueError: if the two were not measured on the same images.
    """
    if a.image_ids != b.image_ids:
        raise ValueError(
            f"a paired difference needs the same images: {len(a.image_ids)} and {len(b.image_ids)} were given, "
            f"{len(set(a.image_ids) & set(b.image_ids))} of them common"
        )
    return bootstrap(a, replicates, seed) - bootstrap(b, replicates, seed)


_RECALLS = np.linspace(0, 1, 101)  # pycocotools' recThrs


def _index(ground_truth: Json, objects: list[Json]) -> COCO:
    """Ground truth or results for pycocotools, without touching the originals."""
    # pycocotools takes a match with id 0 for no match.
    annotations = [
        {"area": o["bbox"][2] * o["bbox"][3], "iscrowd": 0, **o, "id": id} for id, o in enumerate(objects, 1)
    ]
    coco = COCO()
    coco.dataset = {key: ground_truth[key] for key in ("images", "categories")} | {"annotations": annotations}
    coco.createIndex()
    return coco


def _matches(entries: np.ndarray) -> CategoryMatches:
    """Of (images,) results of pycocotools for one category, some of them None: there is nothing in the image."""
    present = {image: entry for image, entry in enumerate(entries) if entry is not None}
    objects = np.zeros(len(entries), int)
    for index, entry in present.items():
        objects[index] = np.count_nonzero(np.equal(entry["gtIgnore"], 0))
    scores = np.concatenate([entry["dtScores"] for entry in present.values()])
    best_first = np.argsort(-scores, kind="stable")
    image = np.repeat(list(present), [len(entry["dtScores"]) for entry in present.values()])
    matched, ignored = (
        np.concatenate([entry[key] for entry in present.values()], axis=1).astype(bool)[:, best_first]
        for key in ("dtMatches", "dtIgnore")
    )
    return CategoryMatches(image[best_first], matched & ~ignored, ~matched & ~ignored, objects)
