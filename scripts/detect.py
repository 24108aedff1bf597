"""Draws what a detector finds in images."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
import tyro

import detr_jax
from detr_jax import cli
from detr_jax.data.image_files import ImageFiles
from detr_jax.data.scenes import ScenesDataset
from detr_jax.evaluation.detections import predictions
from detr_jax.evaluation.drawing import draw_detections
from detr_jax.files import refuse_existing, replacing, write_json
from detr_jax.model.postprocess import Detections


@dataclass(frozen=True)
class Arguments:
    """Detects objects in images; for every image writes a picture with labelled boxes and a JSON file.

    For example `python scripts/detect.py street.jpg --model detr-r50 --out detections`. Boxes refer to the stored
    pixels; a rotation in the EXIF data is not applied.
    """

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files."""
    scenes: int = 0
    """Instead of files, take the first so many generated validation scenes, which detr-tiny was made for."""
    model: str = "detr-tiny"
    """Name of a detector or path of a checkpoint."""
    preset: str | None = None
    """Architecture of a checkpoint that does not say which it is, e.g. detr-r50."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation."""
    threshold: float = 0.7
    """Least score of a detection."""
    out: Path = Path("runs/detect")
    """Folder for <name>.png and <name>.json of every image."""
    overwrite: bool = False
    """Replace output files that exist."""


def detect(arguments: Arguments) -> None:
    if bool(arguments.images) == bool(arguments.scenes):
        raise ValueError(
            "name one or more image files, or ask for generated scenes by --scenes 4. The default detr-tiny knows only "
            "the shapes of those scenes; for photographs choose e.g. --model detr-r50"
        )
    if not 0 <= arguments.threshold <= 1:
        raise ValueError(f"the threshold is a score from 0 to 1, not {arguments.threshold}")
    paths = arguments.images or tuple(Path(f"scene-{i}") for i in range(arguments.scenes))
    name, count = Counter(path.stem for path in paths).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} images are named {name}, their outputs would replace each other")
    for path in paths:
        for suffix in (".png", ".json"):
            result = arguments.out / (path.stem + suffix)
            if result.resolve() in {image.resolve() for image in arguments.images}:
                raise ValueError(f"{result} is one of the images and would be replaced; choose another folder by --out")
            refuse_existing(result, arguments.overwrite)
    dataset = ImageFiles(arguments.images) if arguments.images else ScenesDataset("val", arguments.scenes)
    model = detr_jax.load(arguments.model, preset=arguments.preset, dtype=jnp.dtype(arguments.dtype))
    names = model.config.labels

    for batch, _, detections in predictions(model, dataset, batch_size=1, progress=False):
        index = int(batch.image_ids[0])
        path = paths[index]
        kept = np.flatnonzero(detections.scores[0] >= arguments.threshold)
        found = Detections(detections.scores[0][kept], detections.labels[0][kept], detections.boxes[0][kept])
        with replacing(arguments.out / f"{path.stem}.png") as temporary:
            draw_detections(dataset[index].image, found, names).save(temporary)
        objects = [
            {"label": names[found.labels[i]], "score": float(found.scores[i]), "box": found.boxes[i].tolist()}
            for i in np.argsort(-found.scores)
        ]
        report = {
            "image": str(path),
            "model": arguments.model,
            "threshold": arguments.threshold,
            "box_format": "x0, y0, x1, y1 in pixels",
            "detections": objects,
        }
        write_json(arguments.out / f"{path.stem}.json", report)
        print(f"{path}: {len(objects)} objects -> {arguments.out / path.stem}.png")


if __name__ == "__main__":
    cli.run(detect, Arguments)
