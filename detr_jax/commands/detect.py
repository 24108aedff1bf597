"""`detr-jax detect`: objects in images, drawn and as JSON."""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from detr_jax.commands.options import ModelOptions
from detr_jax.data.image_list import GivenImages
from detr_jax.data.scenes import SIDE, ScenesDataset
from detr_jax.detection import check_threshold, detect_each
from detr_jax.errors import InputError
from detr_jax.files import refuse_existing, replacing, write_json
from detr_jax.viz.boxes import draw_detections
from detr_jax.weights import EMBEDDED


@dataclass(frozen=True)
class Arguments(ModelOptions):
    """Detects objects in images; for every image writes a picture with labelled boxes and a JSON file.

    For example `detr-jax detect street.jpg --model detr-r50 --out detections`. The default detr-tiny and
    deformable-tiny come with the package and know only the shapes of generated scenes. Boxes refer to the upright
    image.
    """

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files."""
    scenes: int = 0
    """Instead of files, take the first so many generated validation scenes, which detr-tiny was made for; of 256 pixels
    a side for deformable-tiny."""
    plan: str | None = None
    """Plan of the detector, which computes sparse with it: a file, a folder, a hub id, or an embedded detector."""
    threshold: float = 0.7
    """Least score of a detection."""
    out: Path = Path("runs/detect")
    """Folder for <name>.png and <name>.json of every image."""
    overwrite: bool = False
    """Replace output files that exist."""


def main(arguments: Arguments) -> None:
    """Runs the command."""
    if bool(arguments.images) == bool(arguments.scenes):
        raise InputError("name one or more image files, or ask for generated scenes by --scenes 4")
    check_threshold(arguments.threshold)
    paths = arguments.images or tuple(Path(f"scene-{i}") for i in range(arguments.scenes))
    name, count = Counter(path.stem for path in paths).most_common(1)[0]
    if count > 1:
        raise InputError(f"{count} images are named {name}, their outputs would replace each other")
    for path in paths:
        for suffix in (".png", ".json"):
            result = arguments.out / (path.stem + suffix)
            if result.resolve() in {image.resolve() for image in arguments.images}:
                raise InputError(f"{result} is one of the images and would be replaced; choose another folder by --out")
            refuse_existing(result, arguments.overwrite)
    side = EMBEDDED.get(arguments.model, SIDE)
    dataset = GivenImages(arguments.images) if arguments.images else ScenesDataset("val", arguments.scenes, side)
    model = arguments.load() if arguments.plan is None else arguments.load_sparse(arguments.plan)
    if arguments.images and (name := arguments.model) in EMBEDDED:
        print(
            f"note: {name} knows only the shapes of generated scenes; choose e.g. --model detr-r50 for photographs",
            file=sys.stderr,
        )

    for index, found in detect_each(model, dataset, arguments.threshold):
        path, target = paths[index], arguments.out / paths[index].stem
        with replacing(Path(f"{target}.png")) as temporary:
            draw_detections(dataset[index].image, found).save(temporary)
        objects = [
            {"label": name, "score": score, "box": box}
            for name, score, box in zip(found.names, found.scores.tolist(), found.boxes.tolist(), strict=True)
        ]
        report: dict[str, Any] = {"image": str(path), "model": arguments.model, "plan": arguments.plan}
        report |= {"threshold": arguments.threshold, "box_format": "x0, y0, x1, y1 in pixels", "detections": objects}
        write_json(Path(f"{target}.json"), report)
        print(f"{path}: {len(objects)} object{'' if len(objects) == 1 else 's'} -> {target}.png")
