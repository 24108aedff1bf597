"""Sections that the HTML reports of commands share: what ran, and sample images, dense and sparse."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_hex

from detr_jax.commands import cli
from detr_jax.data.dataset import Dataset, Json, Subset
from detr_jax.data.features import backbone_features
from detr_jax.evaluation.runs import measure_selections
from detr_jax.mesh import replicate
from detr_jax.models import Detector, Selectors
from detr_jax.models.detections import ImageDetections
from detr_jax.sparse import SparseDETR
from detr_jax.viz.activity_map import HEAT, ImageActivity, brightest
from detr_jax.viz.boxes import draw_detections
from detr_jax.viz.report import Folded, Gallery, Part, Picture, Scale, Section
from detr_jax.viz.tables import Table

REPORT = "report.html"
SAMPLES = 4
_LEAST_SCORE = 0.7
_PAIR, _MAP = 400, 150
"""Least widths of pictures, in pixels of a screen."""
_PAIR_PIXELS, _MAP_PIXELS = 800, 200
"""Longer sides. Detectors with many layers and strides have some 200 maps, for which a report must not be too large."""
_KINDS = {
    "active": "active: share of each token's neurons",
    "kept": "kept by the plan: share of each token's neurons, or of its input channels",
}


def what_ran(results: Mapping[str, Any], facts: Mapping[str, object]) -> Section:
    """The command line, the detector, `facts`, the device, the time, versions and all arguments.

    `results` are what the command writes as JSON.
    """
    lines = {
        "command": cli.command_line(),
        "detector": f"{results['model']}, fingerprint {results['fingerprint'][:16]}",
        **facts,
        "devices": f"{results['devices']} {results['device']}",
        "time (h:mm:ss)": timedelta(seconds=round(results["seconds"])),
        "versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
    }
    return Section("What ran", [lines, Folded("All arguments", dict(_flat(results["arguments"])))])


def _flat(arguments: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def detect_samples(
    model: Detector, data: Dataset, selections: Mapping[str, Selectors], batch_size: int, group_size: int
) -> dict[str, list[Json]]:
    """Detections in the first images with each of several selections by title, in COCO's results format.

    After `evaluate_selections` with the same arguments nothing is compiled. Every process of a job has to take part.
    """
    placed, first = replicate(model), Subset(data, 0, min(SAMPLES, len(data)))
    features = backbone_features(placed, first, batch_size, None)
    measured = measure_selections(placed, features, selections, group_size=group_size)
    return {title: one.results for title, one in measured.items()}


def sample_sections(
    model: SparseDETR, data: Dataset, dense: Sequence[Json], sparse: Sequence[Json], title: str
) -> list[Section]:
    """Sections with the first images: detections dense and sparse, and where the FFNs work.

    Args:
        model: with the plan.
        data: images of any sizes; annotations are not used.
        dense: detections in some images, in COCO's results format.
        sparse: the same with the plan.
        title: of the plan.
    """
    about = (
        f"Detections with a score of {_LEAST_SCORE:g} or more, dense and sparse ({title}), and where on the image the "
        "FFNs work. Object queries have no place: for FFNs of the decoder there are numbers only."
    )
    sections = [Section("Sample images", [about])]
    shown = {result["image_id"] for result in dense}
    for index in [i for i, id in enumerate(data.image_ids()) if id in shown][:SAMPLES]:
        example = data[index]
        found = {"dense": dense, "sparse": sparse}
        pictures = [_drawn(example.image, name, _in_image(r, example.image_id, model)) for name, r in found.items()]
        parts = [Gallery(pictures, _PAIR), *_activity(example.image, ImageActivity.of(model, example.image))]
        sections.append(Section(Path(data.image_name(index)).name, parts))
    return sections


def _in_image(results: Sequence[Json], image_id: int, model: SparseDETR) -> ImageDetections:
    """Detections of an image with a score of `_LEAST_SCORE` or more, the best first."""
    found = [result for result in results if result["image_id"] == image_id and result["score"] >= _LEAST_SCORE]
    found.sort(key=lambda result: -result["score"])
    boxes = np.array([result["bbox"] for result in found], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = np.array([result["category_id"] for result in found], np.int32)
    scores = np.array([result["score"] for result in found], np.float32)
    return ImageDetections(boxes, labels, tuple(model.labels[label] for label in labels), scores)


def _drawn(image: np.ndarray, title: str, found: ImageDetections) -> Picture:
    names = (name or str(label) for name, label in zip(found.names, found.labels.tolist(), strict=True))
    listing = ", ".join(f"{name} {score:.2f}" for name, score in zip(names, found.scores.tolist(), strict=True))
    return Picture.of(
        draw_detections(image, found), f"{title}: {listing or 'nothing'}", f"{title} detections", _PAIR_PIXELS
    )


def _activity(image: np.ndarray, activity: ImageActivity) -> Iterator[Part]:
    """Maps of the FFNs whose tokens lie on a grid, then the shares of all FFNs in numbers."""
    colours = [to_hex(HEAT(share)) for share in np.linspace(0, 1, 9)]
    for kind, label in _KINDS.items() if activity.maps else ():
        most = brightest(activity.maps, kind)
        yield Scale(label, colours, "0 %", f"{100 * most:.1f} %")
        pictures = []
        for one in activity.maps:
            caption = f"{one.title}: {100 * getattr(one, kind).mean():.1f} %"
            heat, description = one.over(image, kind, most), f"map of what is {kind}, {caption}"
            pictures.append(Picture.of(heat, caption, description, _MAP_PIXELS))
        yield Gallery(pictures, _MAP)
    shares = {name: activity.shares(name) for name in activity.layers}
    rows = [[name, f"{100 * active:.2f} %", f"{100 * kept:.2f} %"] for name, (active, kept) in shares.items()]
    yield Table(("FFN", "active", "kept"), rows)
