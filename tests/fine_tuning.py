"""A small detector and data set in COCO's layout for tests of fine-tuning; padded to one shape, one program a step."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tiny import TINY_CONFIG, annotation, tiny_detector, write_coco

import detr_jax
from detr_jax.models import Preprocessing

CONFIG = dataclasses.replace(TINY_CONFIG, preprocessing=Preprocessing(32, 32))
COLOURS = {"dog": (230, 40, 40), "fox": (40, 60, 220)}
"""Classes of the data by their colour. The detector knows one of them."""


def write_inputs(root: Path, images: int = 16) -> Path:
    """A detector, and images with a coloured box each in both splits."""
    detr_jax.save(tiny_detector(config=CONFIG), root / "detector.safetensors")
    for seed, split in enumerate(("train2017", "val2017")):
        rng = np.random.default_rng(seed)
        objects = []
        for image_id in range(1, images + 1):
            x, y, width, height = *rng.integers(0, 16, 2), *rng.integers(10, 16, 2)
            objects.append(annotation(image_id, image_id, (int(x), int(y), int(width), int(height)), 3 + image_id % 2))
        write_coco(root, [(32, 32)] * images, objects, split)
        for path, one in zip(sorted((root / split).iterdir()), objects, strict=True):
            x, y, width, height = one["bbox"]
            pixels = np.full((32, 32, 3), 120, np.uint8)
            pixels[y : y + height, x : x + width] = list(COLOURS.values())[one["category_id"] - 3]
            Image.fromarray(pixels).save(path)
        path = root / "annotations" / f"instances_{split}.json"
        categories = [{"id": id, "name": name} for id, name in enumerate(COLOURS, 3)]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"categories": categories}))
    return root
