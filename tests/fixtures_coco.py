"""A COCO folder of photographs of three padded shapes and a detector that finds something in them, made once."""

import json
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from tiny import annotation, tiny_detector, write_coco

import detr_jax
from detr_jax.data.registry import open_dataset

SIZES = [(32, 40), (60, 32), (32, 60)] * 4
"""Their padded shapes are (32, 40), (64, 32) and (32, 64)."""


def varied_detector() -> detr_jax.DETR:
    """The tiny detector, but with activations that differ from token to token and from query to query."""
    model = tiny_detector()
    for path, value in nnx.to_flat_state(nnx.state(model)):
        if "scale" in path and "transformer" in path:
            value[...] = jnp.ones_like(value[...])
        elif path[-2:] == ("query", "kernel"):
            value[...] *= 10
        elif path == ("input_projection", "kernel"):
            value[...] *= 100
        elif path[-1] == "w_in":
            value[...] *= 3
        elif path[-1] == "b_in":
            value[...] -= 1
    return model


class MixedShapes(NamedTuple):
    """The folder, and the detector's file."""

    coco: Path
    model: Path

    @property
    def options(self) -> list[object]:
        return ["--model", self.model, "--coco", self.coco]


@pytest.fixture(scope="session")
def mixed_shapes(tmp_path_factory) -> MixedShapes:
    """12 images in each split; their objects are detections of the detector, so that it has an AP to lose."""
    root = tmp_path_factory.mktemp("mixed")
    model, rng = varied_detector(), np.random.default_rng(0)
    for split in ("train2017", "val2017"):
        write_coco(root, SIZES, [], split)
        for path in (root / split).iterdir():  # patches of one colour differ more than noise does
            width, height = Image.open(path).size
            patches = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
            Image.fromarray(patches.repeat(8, 0).repeat(8, 1)[:height, :width]).save(path)
        dataset = open_dataset(f"coco:{root}", split)
        found = detr_jax.detect(model, [dataset[i].image for i in range(len(dataset))], 0.0)
        objects = []
        for image_id, detections in zip(dataset.image_ids(), found, strict=True):
            for (x0, y0, x1, y1), label in zip(detections.boxes.tolist(), detections.labels.tolist(), strict=True):
                if label and min(x1 - x0, y1 - y0) > 2:
                    objects.append(annotation(len(objects) + 1, image_id, (x0, y0, x1 - x0, y1 - y0), label))
        path = root / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": objects}))
    detr_jax.save(model, root / "detector.safetensors")
    return MixedShapes(root, root / "detector.safetensors")
