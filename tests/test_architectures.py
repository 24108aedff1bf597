"""Detectors of every architecture through the same calls: fit, plan file, inspection, evaluation."""

import dataclasses

import numpy as np
import pytest
from tiny import TINY_CONFIG, annotation, tiny_detector, write_coco

import detr_jax
from detr_jax.data.coco import CocoDataset
from detr_jax.models import BackboneConfig, ConditionalDetrConfig, DeformableDetrConfig

BASIC = BackboneConfig(depths=(1, 1), widths=(4, 8), strides=(1, 2), stem_width=4, block="basic")
FIELDS = {field.name: getattr(TINY_CONFIG, field.name) for field in dataclasses.fields(TINY_CONFIG)}
DEFORMABLE = {"d_model": 32, "levels": 3, "backbone_levels": 2, "encoder_points": 2, "decoder_points": 2}
DEFORMABLE |= {"refine": True, "two_stage": True}
CONFIGS = {
    "pre-norm": dataclasses.replace(TINY_CONFIG, backbone=BASIC, pre_norm=True),
    "conditional": ConditionalDetrConfig(**FIELDS),
    "deformable": DeformableDetrConfig(**FIELDS | DEFORMABLE),
}
METHODS = (detr_jax.methods.MGS(group_size=4, epochs=1), detr_jax.methods.Experts(experts=2, rounds=1, router_steps=5))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    sizes = [(32, 40), (32, 40), (40, 32), (40, 32)]  # few, since Deformable DETR compiles for each
    annotations = [annotation(i, i, (2, 2, 12, 9)) for i in range(1, 5)]
    return CocoDataset(write_coco(tmp_path_factory.mktemp("coco"), sizes, annotations), "val2017")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("name", CONFIGS)
def test_sparse_like_any_other(name, method, data, tmp_path):
    model = tiny_detector(config=CONFIGS[name])
    detr_jax.save(model, tmp_path / "model.safetensors")
    model = detr_jax.load(tmp_path / "model.safetensors")
    assert model.config == CONFIGS[name]
    before = detr_jax.fingerprint(model)
    budget = detr_jax.Density(0.5)
    options = detr_jax.FitOptions(batch_size=2, statistics_images=4)
    sparse = detr_jax.sparsify(model, data, method, budget, calibration=2, options=options, progress=False)
    detr_jax.save_plan(sparse.plan, tmp_path / "plan.safetensors")
    loaded = detr_jax.load_sparse(tmp_path / "model.safetensors", tmp_path / "plan.safetensors")
    assert detr_jax.fingerprint(model) == before
    image = data[0].image
    found, expected = (one.detect(image, threshold=0.0) for one in (loaded, sparse))
    np.testing.assert_array_equal(found.boxes, expected.boxes)
    assert set(loaded.inspect(*detr_jax.preprocess_images(image, model.preprocessing))) == set(model.ffn_specs())
    scores = detr_jax.evaluate(loaded, data, batch_size=2)
    assert 0 <= scores.numbers["AP"] <= 1
    assert np.mean([counts.density for counts in scores.counts.values()]) < 1
