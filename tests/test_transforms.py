from pathlib import Path

import numpy as np
import pytest

from detr_jax import preset_config
from detr_jax.data.images import pixels as pixels_of
from detr_jax.data.transforms import normalise, preprocess, resized_size

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
    assert resized_size(size, 800, 1333) == resized


def test_an_image_without_a_shorter_side_is_refused():
    with pytest.raises(ValueError, match="10000x3 pixels is too elongated"):
        resized_size((3, 10000), 800, 1333)


def test_an_image_of_the_right_size_is_only_normalised():
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    np.testing.assert_array_equal(preprocess(image, TINY), normalise(image, TINY))
