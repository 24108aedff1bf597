import json
from pathlib import Path

import numpy as np
import pytest

from detr_jax import preset_config
from detr_jax.convert.facts import read_facts
from detr_jax.data.images import pixels as pixels_of
from detr_jax.data.loading import padded_size
from detr_jax.data.transforms import normalise, preprocess
from detr_jax.models import Preprocessing

HERE = Path(__file__).parent
TINY = preset_config("detr-tiny").preprocessing


def test_pixels_equal_the_official_ones():
    golden = np.load(HERE / "golden/official_detr_r50.npz")
    pixels = preprocess(pixels_of(HERE / "data/000000000139.jpg"), preset_config("detr-r50").preprocessing)
    assert pixels.dtype == np.float32
    assert pixels.shape == (*golden["full_size"], 3)
    channels_first = pixels.transpose(2, 0, 1)
    np.testing.assert_array_equal(channels_first[:, :4, :4], golden["full_pixels_corner"])
    np.testing.assert_array_equal(channels_first[:, 400:404, 500:504], golden["full_pixels_centre"])
    exact = pixels.astype(np.float64)
    np.testing.assert_allclose(exact.mean((0, 1)), golden["full_pixels_mean"], atol=2e-6)
    np.testing.assert_allclose(exact.std((0, 1)), golden["full_pixels_std"], rtol=2e-6)


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((480, 640), (800, 1066)),
        ((640, 480), (1066, 800)),
        ((426, 640), (800, 1201)),
        ((500, 500), (800, 800)),
        ((800, 1000), (800, 1000)),
        ((640, 200), (1334, 417)),  # the cap acts, and the official rounding exceeds it
        ((333, 640), (694, 1333)),
        ((1, 640), (2, 1280)),
    ],
)
def test_sizes_are_rounded_officially(size, resized):
    assert Preprocessing().resized_size(size) == resized


def test_the_longer_side_is_rounded_as_transformers_does():
    """From the unrounded shorter side: one pixel off the official code where the cap acts."""
    preprocessing = Preprocessing(resize="transformers")
    assert preprocessing.resized_size((640, 200)) == (1333, 417)
    assert preprocessing.resized_size((480, 640)) == (800, 1066)


FORMS = {
    "both edges": {"size": {"shortest_edge": 320, "longest_edge": 480}},
    "equal edges": {"size": {"shortest_edge": 333, "longest_edge": 333}},
    "number": {"size": 300, "max_size": 401},
    "fit": {"size": {"max_height": 300, "max_width": 333}},
    "stretch": {"size": {"height": 320, "width": 200}},
    "as it is": {"do_resize": False},
    "bicubic": {"size": {"shortest_edge": 320, "longest_edge": 480}, "resample": 3},
    "other numbers": {"size": 320, "rescale_factor": 0.005, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]},
    "only resized": {"size": 320, "do_rescale": False, "do_normalize": False},
}


@pytest.mark.parametrize("size", [(427, 640), (333, 201), (97, 301), (480, 480), (999, 333)])
@pytest.mark.parametrize("form", FORMS)
def test_pixels_equal_those_of_transformers(form, size, tmp_path):
    processors = pytest.importorskip("transformers.models.detr.image_processing_pil_detr")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(FORMS[form]))
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    expected = processors.DetrImageProcessorPil(**FORMS[form])(image, return_tensors="np")["pixel_values"][0]
    pixels = preprocess(image, read_facts(tmp_path).preprocessing)
    np.testing.assert_allclose(pixels, expected.transpose(1, 2, 0), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_padded_shapes_are_few_and_hold_every_image(form, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(FORMS[form]))
    preprocessing = read_facts(tmp_path).preprocessing
    shapes = set()
    for size in np.random.default_rng(0).integers(200, 1500, (2000, 2)):
        resized = preprocessing.resized_size(size)
        padded = padded_size(resized, preprocessing)
        assert padded[0] >= resized[0] and padded[1] >= resized[1]
        assert padded[0] % 32 == padded[1] % 32 == 0
        shapes.add(padded)
    assert len(shapes) <= (36 if form == "as it is" else 10)


def test_an_image_without_a_shorter_side_is_refused():
    with pytest.raises(ValueError, match="10000x3 pixels is too elongated"):
        Preprocessing().resized_size((3, 10000))


def test_an_image_of_the_right_size_is_only_normalised():
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    np.testing.assert_array_equal(preprocess(image, TINY), normalise(image, TINY))
