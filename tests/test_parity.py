"""Equality with the official PyTorch DETR, by the golden arrays of tests/golden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from coco_images import IMAGES, padded, small_images
from flax import nnx
from published import GOLDEN, recipe_entries

from detr_jax import convert
from detr_jax.data.images import pixels as pixels_of
from detr_jax.data.transforms import preprocess
from detr_jax.load import build

# The official code in float64 is 1.2e-5 (logits) and 1.6e-6 (boxes) away from the golden float32 arrays.
LOGITS, BOXES = 2e-4, 2e-5


@nnx.jit
def forward(model, pixels, mask=None):
    outputs = model(pixels, mask)
    return outputs.logits, outputs.boxes


others = [pytest.param(variant, marks=pytest.mark.slow) for variant in ("r50_dc5", "r101", "r101_dc5")]
variants = pytest.mark.parametrize("variant", ["r50", *others], scope="module")
only_r50 = pytest.mark.parametrize("variant", ["r50"], scope="module")


@pytest.fixture(scope="module")
def checkpoint(variant):
    entries = recipe_entries(f"official_detr_{variant}")
    return convert.published_checkpoint("recipe", entries, f"detr-{variant.replace('_', '-')}")


@pytest.fixture(scope="module")
def model(checkpoint):
    return build(checkpoint)


@pytest.fixture(scope="module")
def golden(variant):
    return np.load(GOLDEN / f"official_detr_{variant}.npz")


def assert_golden(outputs, golden, kind):
    logits, boxes = outputs
    np.testing.assert_allclose(logits, golden[f"{kind}_logits"], rtol=0, atol=LOGITS)
    np.testing.assert_allclose(boxes, golden[f"{kind}_boxes"], rtol=0, atol=BOXES)


@only_r50
@pytest.mark.slow
def test_full_size(model, golden):
    pixels = preprocess(pixels_of(IMAGES[0]), model.preprocessing)
    np.testing.assert_array_equal(pixels.shape[:2], golden["full_size"].reshape(-1))
    assert_golden(forward(model, pixels[None]), golden, "full")


@only_r50
@pytest.mark.slow
def test_bfloat16(checkpoint, model):
    """Every product is of numbers as coarse as rounded parameters, so the error is a small multiple of theirs."""
    pixels = small_images(model.config)[0][None]
    rounded = build(checkpoint)
    nnx.update(rounded, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), nnx.state(rounded)))
    expected = forward(model, pixels)
    for exact, parameters, everything in zip(
        expected, forward(rounded, pixels), forward(build(checkpoint, jnp.bfloat16), pixels), strict=True
    ):
        assert everything.dtype == jnp.float32
        assert jnp.linalg.norm(everything - exact) < 3 * jnp.linalg.norm(parameters - exact)


@variants
def test_single(model, golden):
    assert_golden(forward(model, small_images(model.config)[0][None]), golden, "single")


@variants
def test_padded_batch(model, golden):
    images = small_images(model.config)
    np.testing.assert_array_equal([image.shape[:2] for image in images], golden["batch_sizes"])
    assert_golden(forward(model, *padded(images)), golden, "batch")
