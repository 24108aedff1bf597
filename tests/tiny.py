"""Small stand-ins that several tests share: a detector, and a data set in COCO's layout."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from detr_jax import DETR, DetrConfig
from detr_jax.model import BackboneConfig

TINY_CONFIG = DetrConfig(
    BackboneConfig(depths=(1, 1), widths=(4, 8), strides=(1, 2), stem_width=4),
    labels=("", "cat", "dog"),
    d_model=16,
    heads=2,
    ffn_features=32,
    encoder_layers=1,
    decoder_layers=1,
    queries=5,
    shortest_side=32,
    longest_side=64,
)


def tiny_detector(seed: int = 0) -> DETR:
    """A detector with random parameters, stride 8. They come from numpy, because JAX would compile for each shape."""
    abstract = nnx.eval_shape(lambda: DETR(TINY_CONFIG, rngs=nnx.Rngs(0)))
    graph, parameters, statistics = nnx.split(abstract, nnx.Param, nnx.BatchStat)
    rng = np.random.default_rng(seed)
    parameters = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), parameters)
    statistics = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1, leaf.shape), leaf.dtype), statistics)
    return nnx.merge(graph, parameters, statistics)


def write_coco(root: Path, sizes: list[tuple[int, int]], annotations: list[dict], split: str = "val2017") -> Path:
    """Writes images of (height, width), with ids 1, 2, ... and random pixels, and their annotation file."""
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    images = []
    for i, (height, width) in enumerate(sizes, 1):
        name = f"{i:012}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(root / split / name)
        images.append({"id": i, "file_name": name, "height": height, "width": width, "license": 1})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def annotation(
    id: int, image_id: int, bbox: tuple[float, float, float, float], category_id: int = 1, iscrowd: int = 0
) -> dict:
    """An entry of an annotation file."""
    area = bbox[2] * bbox[3]
    return {
        "id": id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(bbox),
        "area": area,
        "iscrowd": iscrowd,
    }
