import dataclasses
import os
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny import TINY_CONFIG, annotation, write_coco

from detr_jax import preset_config
from detr_jax.data.coco import CocoDataset
from detr_jax.data.loading import batches, layout_batches, padded_size
from detr_jax.data.prefetch import dispatch_ahead, processes_for
from detr_jax.data.scenes import ScenesDataset
from detr_jax.data.transforms import preprocess
from detr_jax.models import Preprocessing

R50, TINY = preset_config("detr-r50"), preset_config("detr-tiny")
SIZES = [(20, 30), (30, 20), (20, 30), (16, 16), (40, 44), (8, 60), (20, 31)]


@pytest.fixture
def dataset(tmp_path):
    return CocoDataset(write_coco(tmp_path, SIZES, [annotation(1, 2, (1, 2, 3, 4))]), "val2017")


def equal(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b))
    )


def test_padded_sizes_are_few_and_large_enough():
    rng = np.random.default_rng(0)
    for config in (R50, preset_config("detr-r50-dc5"), TINY):
        stride, shapes = config.backbone.stride, set()
        for size in rng.integers(100, 1500, (2000, 2)):
            resized = config.preprocessing.resized_size(size)
            padded = padded_size(resized, config.preprocessing)
            assert padded[0] >= resized[0]
            assert padded[1] >= resized[1]
            assert padded[0] % stride == padded[1] % stride == 0
            shapes.add(padded)
        assert len(shapes) <= 10


@pytest.mark.parametrize(
    ("size", "config", "padded"),
    [
        ((800, 1066), R50, (800, 1088)),
        ((1066, 800), R50, (1088, 800)),
        ((800, 800), R50, (800, 800)),
        ((417, 1334), R50, (800, 1344)),
        ((16, 1350), R50, (800, 1376)),  # beyond the cap by rounding
        ((128, 128), TINY, (128, 128)),
        ((128, 170), TINY, (128, 176)),
        ((213, 90), TINY, (224, 128)),
    ],
)
def test_padded_size(size, config, padded):
    assert padded_size(size, config.preprocessing) == padded


def test_scenes_are_not_padded():
    layouts = layout_batches(ScenesDataset("val").image_sizes(), TINY.preprocessing, 32)
    assert {layout.shape for layout in layouts} == {(32, 128, 128)}
    (batch,) = batches(ScenesDataset("val", images=2), TINY.preprocessing, 2)
    assert batch.pixel_mask.all()


def test_every_image_is_loaded_once(dataset):
    seen = []
    for batch in batches(dataset, TINY_CONFIG.preprocessing, 2):
        assert batch.pixel_values.dtype == np.float32
        assert batch.pixel_values.shape[:3] == batch.pixel_mask.shape
        assert len(batch.boxes) == len(batch.labels) == batch.valid.sum()
        for i in range(2):
            index = int(batch.image_ids[i]) - 1
            expected = preprocess(dataset[index].image, TINY_CONFIG.preprocessing)
            height, width, _ = expected.shape
            np.testing.assert_array_equal(batch.pixel_values[i, :height, :width], expected)
            assert batch.pixel_mask[i, :height, :width].all()
            assert batch.pixel_mask[i].sum() == height * width
            assert not batch.pixel_values[i][~batch.pixel_mask[i]].any()
            assert tuple(batch.sizes[i]) == SIZES[index]
        seen += batch.image_ids[batch.valid].tolist()
        if 2 in batch.image_ids:
            np.testing.assert_array_equal(batch.boxes[0], [[1, 2, 4, 6]])
    assert sorted(seen) == dataset.image_ids()


def test_a_batch_is_filled_up_with_copies(dataset):
    portrait = [b for b in batches(dataset, TINY_CONFIG.preprocessing, 4) if 2 in b.image_ids]
    (batch,) = portrait
    assert batch.valid.tolist() == [True, False, False, False]
    assert batch.image_ids.tolist() == [2, 2, 2, 2]
    np.testing.assert_array_equal(batch.pixel_values[3], batch.pixel_values[0])
    np.testing.assert_array_equal(batch.pixel_mask[3], batch.pixel_mask[0])


def test_exact_shapes_have_neither_padding_nor_copies(dataset):
    loaded = list(batches(dataset, TINY_CONFIG.preprocessing, 4, exact=True))
    assert all(batch.pixel_mask.all() and batch.valid.all() for batch in loaded)
    assert sorted(len(batch.valid) for batch in loaded) == [1, 1, 1, 1, 1, 2]


def test_the_order_is_a_function_of_seed_and_epoch():
    sizes = np.random.default_rng(0).integers(300, 700, (100, 2))

    def layouts(**options):
        return layout_batches(sizes, R50.preprocessing, 8, **options)

    assert layouts(shuffle_seed=1, epoch=2) == layouts(shuffle_seed=1, epoch=2)
    for other in ({"shuffle_seed": 1, "epoch": 3}, {"shuffle_seed": 2, "epoch": 2}, {}):
        assert layouts(shuffle_seed=1, epoch=2) != layouts(**other)
        assert len(layouts(shuffle_seed=1, epoch=2)) == len(layouts(**other))
        assert sorted(i for layout in layouts(**other) for i in layout.indices) == list(range(100))


def test_start_goes_on_exactly(dataset):
    everything = list(batches(dataset, TINY_CONFIG.preprocessing, 2, shuffle_seed=3, epoch=1))
    rest = list(batches(dataset, TINY_CONFIG.preprocessing, 2, shuffle_seed=3, epoch=1, start=2))
    assert len(rest) == len(everything) - 2
    assert all(map(equal, rest, everything[2:]))
    assert list(batches(dataset, TINY_CONFIG.preprocessing, 2, start=len(everything))) == []
    for start in (-1, len(everything) + 1):
        with pytest.raises(ValueError, match=f"start at batch {start} of {len(everything)}"):
            batches(dataset, TINY_CONFIG.preprocessing, 2, start=start)


def test_a_batch_needs_an_image(dataset):
    with pytest.raises(ValueError, match="at least one image, not 0"):
        batches(dataset, TINY_CONFIG.preprocessing, 0)


def test_errors_of_the_background_arrive_as_they_are(dataset, tmp_path):
    (tmp_path / "val2017/000000000004.png").write_text("no image")
    with pytest.raises(ValueError, match=r"cannot read .*000000000004\.png"):
        list(batches(dataset, TINY_CONFIG.preprocessing, 2))


def test_processes_load_what_threads_do(dataset, tmp_path):
    """And an error in one of them arrives as it is."""
    expected = list(batches(dataset, TINY_CONFIG.preprocessing, 2, processes=0))
    broken = max(max(batch.image_ids.tolist()) for batch in expected[2:])
    (tmp_path / f"val2017/{broken:012}.png").write_text("no image")
    loaded = batches(dataset, TINY_CONFIG.preprocessing, 2, processes=1)
    for batch in expected:
        if broken in batch.image_ids:
            break
        assert equal(next(loaded), batch)
    with pytest.raises(ValueError, match=rf"cannot read .*{broken:012}\.png"):
        next(loaded)


def test_processes_load_large_passes_only(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(96), raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=200 * 2**30))
    megabytes = 8 * 800 * 1088 * 3 * 4
    assert (processes_for(1000, megabytes), processes_for(4000, megabytes)) == (0, 16)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    assert processes_for(4000, megabytes) == 3  # of 334 MB each
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2), raising=False)
    assert processes_for(4000, megabytes) == 0


def test_the_next_item_is_asked_for_before_one_is_given():
    asked, given = [], []
    for item in dispatch_ahead(asked.append(i) or i for i in range(4)):
        given.append((item, len(asked)))
    assert given == [(0, 2), (1, 3), (2, 4), (3, 4)]
    assert list(dispatch_ahead([])) == [] and list(dispatch_ahead([7])) == [7]


def test_photographs_fit_the_embedded_detector(dataset):
    config = dataclasses.replace(TINY_CONFIG, preprocessing=Preprocessing(128, 213))
    assert sum(batch.valid.sum() for batch in batches(dataset, config.preprocessing, 3)) == len(SIZES)
