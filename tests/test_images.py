import warnings

import numpy as np
import pytest
from PIL import Image

from detr_jax.data.image_list import GivenImages
from detr_jax.data.images import read_image, read_size

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8)


def written(path, mode, **options):
    Image.fromarray(PIXELS).convert(mode).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("grey.png", "L"),
        ("bits.png", "1"),
        ("grey_alpha.png", "LA"),
        ("rgb.png", "RGB"),
        ("alpha.png", "RGBA"),
        ("palette.png", "P"),
        ("palette.gif", "P"),
        ("cmyk.jpg", "CMYK"),
        ("cmyk.tiff", "CMYK"),
        ("grey.jpg", "L"),
        ("lossless.webp", "RGB"),
    ],
)
def test_every_mode_becomes_rgb_as_in_the_official_loader(tmp_path, name, mode):
    path = written(tmp_path / name, mode)
    image = read_image(path)
    assert (image.shape, image.dtype) == ((6, 10, 3), np.uint8)
    np.testing.assert_array_equal(image, np.asarray(Image.open(path).convert("RGB")))
    assert read_size(path) == (6, 10)


def test_transparency_of_a_palette_is_dropped(tmp_path):
    palette = Image.fromarray(PIXELS).quantize(16)
    palette.save(tmp_path / "plain.png")
    palette.save(tmp_path / "transparent.png", transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL would rather have RGBA
        transparent = read_image(tmp_path / "transparent.png")
    np.testing.assert_array_equal(transparent, read_image(tmp_path / "plain.png"))


def test_exif_rotation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    plain, rotated = written(tmp_path / "a.jpg", "RGB"), written(tmp_path / "b.jpg", "RGB", exif=exif)
    assert Image.open(rotated).getexif()[0x0112] == 6
    np.testing.assert_array_equal(read_image(rotated), read_image(plain))


@pytest.mark.parametrize(("dtype", "suffix"), [(np.uint16, "png"), (np.int32, "tiff"), (np.float32, "tiff")])
def test_deep_grey_images_are_refused_by_name(tmp_path, dtype, suffix):
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(np.full((4, 4), 300, dtype)).save(path)
    with pytest.raises(ValueError, match=rf"deep\.{suffix}.*more than 8 bits"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_truncated_file_is_named(tmp_path, suffix):
    path = tmp_path / f"short.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"cannot read .*short\.{suffix} as an image.*truncated"):
        read_image(path)


def test_files_that_are_not_images_are_named(tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("text.jpg", "empty.jpg"):
        with pytest.raises(ValueError, match=rf"cannot read .*{name} as an image"):
            read_size(tmp_path / name)
    with pytest.raises(ValueError, match="as an image"):
        read_image(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no image .*missing\.jpg"):
        read_image(tmp_path / "missing.jpg")


def test_image_files_are_a_data_set(tmp_path):
    paths = [written(tmp_path / "a.png", "RGB"), written(tmp_path / "b.png", "L")]
    dataset = GivenImages(paths)
    assert (len(dataset), dataset.image_ids()) == (2, [0, 1])
    np.testing.assert_array_equal(dataset.image_sizes(), [(6, 10), (6, 10)])
    example = dataset[0]
    np.testing.assert_array_equal(example.image, PIXELS)
    assert example.boxes.shape == (0, 4)
    assert len(dataset.ground_truth()["images"]) == 2
