import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from detr_jax.data.image_list import GivenImages
from detr_jax.data.images import pixels, pixels_size, read_image
from detr_jax.data.registry import open_dataset
from detr_jax.errors import InputError, MissingFileError

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
    image, orientation = read_image(path)
    assert orientation == 1
    assert (image.shape, image.dtype) == ((6, 10, 3), np.uint8)
    np.testing.assert_array_equal(image, np.asarray(Image.open(path).convert("RGB")))
    assert pixels_size(path) == (6, 10)


def test_transparency_of_a_palette_is_dropped(tmp_path):
    palette = Image.fromarray(PIXELS).quantize(16)
    palette.save(tmp_path / "plain.png")
    palette.save(tmp_path / "transparent.png", transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL would rather have RGBA
        transparent = pixels(tmp_path / "transparent.png")
    np.testing.assert_array_equal(transparent, pixels(tmp_path / "plain.png"))


def rotated(path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return written(path, "RGB", exif=exif)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_made_upright(tmp_path, orientation, suffix):
    path = rotated(tmp_path / f"photo.{suffix}", orientation)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    np.testing.assert_array_equal(pixels(path), upright)
    assert pixels_size(path) == upright.shape[:2]
    with Image.open(path) as image:
        assert pixels_size(image) == upright.shape[:2]
        np.testing.assert_array_equal(pixels(image), upright)


def test_annotated_images_are_read_as_they_are_stored(tmp_path):
    image, orientation = read_image(rotated(tmp_path / "b.jpg", 6))
    np.testing.assert_array_equal(image, pixels(written(tmp_path / "a.jpg", "RGB")))
    assert orientation == 6


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
            pixels_size(tmp_path / name)
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


@pytest.fixture
def folder(tmp_path):
    for name in ("b/2.PNG", "b/10.jpg", "a.jpg", "c.webp", "d.tiff", "e.png", "notes.txt", ".hidden.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("no image")
        else:
            written(path, "RGB")
    rotated(tmp_path / "photos/c.webp", 6)
    return tmp_path / "photos"


def test_a_folder_of_photographs_is_a_data_set(folder):
    everything = open_dataset(f"images:{folder}", "all")
    names = [Path(everything.image_name(i)).relative_to(folder).as_posix() for i in range(len(everything))]
    assert names == ["a.jpg", "b/10.jpg", "b/2.PNG", "c.webp", "d.tiff", "e.png"]
    assert not everything.has_annotations
    truth = everything.ground_truth()
    assert (truth["annotations"], truth["categories"]) == ([], [])
    assert everything.image_sizes().tolist() == [[6, 10]] * 3 + [[10, 6]] + [[6, 10]] * 2
    assert everything[3].image.shape == (10, 6, 3)


def test_the_splits_of_a_folder_are_disjoint_and_fixed(folder):
    train, val = (open_dataset(f"images:{folder}", split) for split in ("train", "val"))
    assert (train.image_ids(), val.image_ids()) == ([0, 1, 2, 3, 5], [4])
    assert train[4].image_id == 5
    assert open_dataset(f"images:{folder}", "train", 2).image_ids() == [0, 1]
    for split, wanted in (("train", 6), ("val", 2), ("train", 0)):
        with pytest.raises(InputError, match=rf"photos has . images .* for the split {split}, asked for {wanted}"):
            open_dataset(f"images:{folder}", split, wanted)
    with pytest.raises(InputError, match="splits train, val, all, not 'test'"):
        open_dataset(f"images:{folder}", "test")


def test_folders_named_after_the_splits_are_the_splits(folder):
    (folder / "b").rename(folder / "val")
    assert [Path(open_dataset(f"images:{folder}", "val").image_name(i)).name for i in (0, 1)] == ["10.jpg", "2.PNG"]
    with pytest.raises(InputError, match=r"photos has 0 images .* for the split train"):
        open_dataset(f"images:{folder}", "train")


def test_the_identity_of_a_folder_is_not_its_path(folder, tmp_path):
    before = open_dataset(f"images:{folder}", "all").fingerprint
    shutil.copytree(folder, tmp_path / "copy")
    assert open_dataset(f"images:{tmp_path / 'copy'}", "all").fingerprint == before
    assert open_dataset(f"images:{folder}", "train").fingerprint != before
    (folder / "a.jpg").rename(folder / "aa.jpg")
    assert open_dataset(f"images:{folder}", "all").fingerprint != before


def test_an_image_that_is_none_stops_before_anything_is_computed(folder):
    (folder / "f.jpg").write_text("no image")
    with pytest.raises(InputError, match=r"cannot read .*f\.jpg as an image"):
        open_dataset(f"images:{folder}", "all")
    with pytest.raises(MissingFileError, match=r"no folder .*absent with images"):
        open_dataset(f"images:{folder / 'absent'}", "all")
