"""Small stand-ins that several tests share: a detector, an FFN, selectors, and a data set in COCO's layout."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from detr_jax import DETR, DetrConfig
from detr_jax import methods as selectors
from detr_jax.data.dataset import Dataset
from detr_jax.evaluation.runs import coco_results, predictions
from detr_jax.methods import LowRankCompensation, Thresholded, low_rank_factors
from detr_jax.models import (
    BackboneConfig,
    Detector,
    FFNWeights,
    OutputLayer,
    Outputs,
    Preprocessing,
    Selector,
    Selectors,
)
from detr_jax.models.registry import abstract_detector

TINY_CONFIG = DetrConfig(
    BackboneConfig(depths=(1, 1), widths=(4, 8), strides=(1, 2), stem_width=4),
    labels=("", "cat", "dog"),
    d_model=16,
    encoder_heads=2,
    decoder_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    encoder_layers=1,
    decoder_layers=1,
    queries=5,
    preprocessing=Preprocessing(32, 64),
)


def tiny_detector(seed: int = 0, dtype: jnp.dtype = jnp.float32, config: DetrConfig = TINY_CONFIG) -> DETR:
    """A detector with random parameters, stride 8. They come from numpy, because JAX would compile for each shape."""
    graph, parameters, statistics = nnx.split(abstract_detector(config, dtype), nnx.Param, nnx.BatchStat)
    rng = np.random.default_rng(seed)
    parameters = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), parameters)
    statistics = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1, leaf.shape), leaf.dtype), statistics)
    return nnx.merge(graph, parameters, statistics)


@partial(jax.jit, static_argnames=("trace", "auxiliary"))
def outputs(
    model: Detector,
    images: jax.Array,
    mask: jax.Array | None = None,
    selectors: Selectors | None = None,
    **options: bool,
) -> Outputs:
    """What a detector returns, compiled as one program."""
    return model(images, mask, selectors=selectors, **options)


def tiny_ffn(
    features: int = 12, d_model: int = 6, images: int = 3, tokens: int = 9, seed: int = 0
) -> tuple[FFNWeights, jax.Array, jax.Array]:
    """An FFN in which most neurons are silent, inputs (images, tokens, d) for it, and (images, tokens) no padding."""
    rng = np.random.default_rng(seed)
    shapes = ((features, d_model), (features,), (features, d_model), (d_model,), (images, tokens, d_model))
    w_in, b_in, w_out, b_out, x = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    # The second image is the smaller one.
    lengths = np.where(np.arange(images) == 1, tokens - 4, tokens)
    return FFNWeights(w_in, b_in - 2, w_out, b_out), x, jnp.asarray(np.arange(tokens) < lengths[:, None])


def every_selector(weights: FFNWeights, group_size: int, seed: int = 1) -> dict[str, Selector]:
    """A selector of every kind for an FFN. Those with a threshold keep a part."""
    rng = np.random.default_rng(seed)
    features, d_model = weights.w_in.shape
    groups = features // group_size

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    linear = selectors.LinearGate(random(d_model, groups), random(groups))
    scores = {
        "lots": (selectors.Random(group_size, seed=5), -0.5),
        "importance": (selectors.Importance(random(groups)), 0.0),
        "hidden magnitude": (selectors.HiddenMagnitude(weighted=False), 0.2),
        "weighted hidden magnitude": (selectors.HiddenMagnitude(weighted=True), 0.2),
        "input magnitude": (selectors.InputMagnitude(weighted=False), 0.5),
        "weighted input magnitude": (selectors.InputMagnitude(weighted=True), 1.5),
        "linear gate": (linear, 0.1),
        "low-rank gate": (selectors.LowRankGate(random(d_model, 2), random(2, groups), random(groups)), 0.1),
        "standardised": (selectors.Standardised(linear), 0.1),
        "share of largest": (selectors.ShareOfLargest(linear), 0.3),
        "pooled": (selectors.Pooled(linear, odds=True), 0.4),
        "pooled windows": (selectors.Pooled(linear, odds=False, window=4), 0.1),
        "sketch": (selectors.sketch(weights, np.ones(d_model), np.eye(d_model), 3, group_size), 2.0),
    }
    found = {name: Thresholded(score, jnp.float32(threshold)) for name, (score, threshold) in scores.items()}
    factors = low_rank_factors(weights, 2)
    of_part = Thresholded(selectors.LinearGate(random(d_model, 2), random(2)), jnp.float32(0.1))
    few = features // 3
    pooled = selectors.Pooled(selectors.LinearGate(random(d_model, few), random(few)), odds=False)
    return found | {
        "fixed set": selectors.Fixed(jnp.arange(groups) != 0, OutputLayer(random(features, d_model), random(d_model))),
        "fixed": selectors.PartitionedSelector(None, few, second=OutputLayer(random(few, d_model), random(d_model))),
        "sections": selectors.PartitionedSelector(of_part, few, features // 2),
        "sections for images": selectors.PartitionedSelector(Thresholded(pooled, jnp.float32(0.1)), 0, few),
        "oracle": selectors.Oracle(group_size),
        "top k": selectors.TopK(linear, jnp.int32(2)),
        "sibs": selectors.IndicatorSelector(
            jnp.array([3, 1]), jnp.asarray(rng.random((2, features)) < 0.4), jnp.asarray(rng.random(features) < 0.9)
        ),
        "compensated channels": LowRankCompensation(found["input magnitude"], factors),
        "compensated groups": LowRankCompensation(found["linear gate"], factors),
    }


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


def detect_dataset(model: Detector, dataset: Dataset, batch_size: int, **options) -> list[dict]:
    """Every image's detections in COCO's results format; `options` of `predictions`."""
    found = predictions(model, dataset, batch_size, progress=False, **options)
    return [result for batch, _, detections, _ in found for result in coco_results(batch, detections)]


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
