"""Statistics of hidden activations: equal to a loop's, additive, permutable, kept in files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open
from tiny import annotation, tiny_detector, write_coco

from detr_jax.calibration.activations import (
    ActivationProfile,
    ActivationStatistics,
    load_profile,
    measure,
    profile_activations,
    save_profile,
)
from detr_jax.calibration.token_kinds import object_tokens, query_targets
from detr_jax.data.coco import CocoDataset
from detr_jax.data.loading import batches
from detr_jax.models import FFNWeights
from detr_jax.models.ffn import permute, trace

BATCH, TOKENS, D, F, SIZE = 3, 9, 5, 12, 4
COUNTS = ("images", "tokens", "fired", "coactive", "images_fired")


def example(seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((F, D), (F,), (F, D), (D,))
    weights = FFNWeights(*(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes))
    x = jnp.asarray(rng.standard_normal((BATCH, TOKENS, D)), jnp.float32)
    tokens = np.arange(TOKENS) < np.array([[TOKENS], [TOKENS - 4], [TOKENS]])
    kinds = np.where(np.arange(BATCH)[:, None] == 2, -1, rng.integers(0, 2, (BATCH, TOKENS)))
    return weights, trace(weights, x, jnp.asarray(tokens)), kinds


def test_statistics_are_those_of_a_loop():
    _, what, kinds = example()
    found = measure(what, kinds, kinds_count=2)
    hidden = np.asarray(what.hidden, np.float64)
    expected = {field.name: np.zeros(getattr(found, field.name).shape) for field in dataclasses.fields(found)}
    for i in range(BATCH):
        seen = np.zeros(F, bool)
        for t in range(TOKENS):
            kind, h = kinds[i, t], hidden[i, t]
            if kind < 0 or not what.tokens[i, t]:
                continue
            seen |= h > 0
            expected["tokens"][kind] += 1
            expected["fired"][kind] += h > 0
            expected["coactive"] += np.outer(h > 0, h > 0)
            expected["hidden"][kind] += h
        expected["images"] += (kinds[i] >= 0).any()
        expected["images_fired"] += seen
    for name, values in expected.items():
        if name in COUNTS:
            np.testing.assert_array_equal(getattr(found, name), values, err_msg=name)
        else:
            np.testing.assert_allclose(getattr(found, name), values, rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(np.diag(found.coactive), np.asarray(found.fired).sum(0))


def test_the_statistics_of_a_permuted_ffn_are_the_permuted_statistics():
    weights, what, kinds = example()
    order = np.random.default_rng(3).permutation(F)
    moved = permute(weights, order)
    one = measure(what, kinds, kinds_count=2)
    other = measure(trace(moved, what.inputs, what.tokens), kinds, kinds_count=2)
    for name in ("fired", "hidden"):
        np.testing.assert_allclose(getattr(other, name), np.asarray(getattr(one, name))[:, order], rtol=1e-6)
    np.testing.assert_array_equal(other.coactive, np.asarray(one.coactive)[np.ix_(order, order)])
    np.testing.assert_array_equal(other.images_fired, np.asarray(one.images_fired)[order])
    for name in ("tokens", "images"):
        np.testing.assert_array_equal(getattr(other, name), getattr(one, name))


def test_sums_do_not_overflow():
    full = ActivationStatistics(*(np.full(2, 2**31 - 1, np.int32) for _ in dataclasses.fields(ActivationStatistics)))
    total = full + full + full
    assert total.fired.dtype == np.int64 and (total.coactive == 3 * (2**31 - 1)).all()
    with pytest.raises(ValueError, match="too large to be counted"):
        jax.eval_shape(
            lambda w, x, k: measure(trace(w, x, k >= 0), k, kinds_count=1),
            FFNWeights(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 1), (2,), (2, 1), (1,)))),
            jax.ShapeDtypeStruct((2**10, 2**14, 1), jnp.float32),
            jax.ShapeDtypeStruct((2**10, 2**14), jnp.int32),
        )


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    boxes = [annotation(i, 1 + i % 7, (2 * i, i, 10 + i, 12), category_id=1 + i % 2) for i in range(1, 12)]
    write_coco(root, [(32, 40), (40, 32), (32, 40), (20, 50), (32, 32), (32, 40), (32, 40)], boxes)
    return root


def profile(coco, path, **options) -> ActivationProfile:
    return profile_activations(tiny_detector(), CocoDataset(coco, "val2017"), 2, path, lambda n: None, **options)


def assert_equal(one: ActivationProfile, other: ActivationProfile, exact: bool = True) -> None:
    assert dataclasses.replace(one, statistics={}) == dataclasses.replace(other, statistics={})
    for name, statistics in one.statistics.items():
        for field in dataclasses.fields(statistics):
            pair = (getattr(s, field.name) for s in (statistics, other.statistics[name]))
            compare = np.testing.assert_array_equal if exact or field.name in COUNTS else np.testing.assert_allclose
            compare(*pair, **({} if compare is np.testing.assert_array_equal else {"rtol": 1e-5}))


def test_an_interrupted_pass_goes_on_to_the_same_statistics(coco, tmp_path):
    whole = profile(coco, tmp_path / "whole.safetensors")
    assert whole.statistics["encoder.0"].images == whole.statistics["decoder.0"].images == 7
    assert whole.statistics["decoder.0"].tokens.tolist() == [7 * 5 - 11, 11]
    assert_equal(whole, load_profile(tmp_path / "whole.safetensors", whole.fingerprint))

    class Interrupted(Exception):
        pass

    seen = []

    def interrupt(images):
        seen.append(images)
        if len(seen) == 4:
            raise Interrupted

    path = tmp_path / "part.safetensors"
    arguments = (tiny_detector(), CocoDataset(coco, "val2017"), 2, path)
    with pytest.raises(Interrupted):
        profile_activations(*arguments, interrupt, checkpoint_batches=2)
    assert load_profile(path, whole.fingerprint).batches == 2
    resumed = []
    assert_equal(whole, profile_activations(*arguments, resumed.append))
    assert sum(resumed) == 7 and resumed[0] > 0

    with pytest.raises(ValueError, match="choose another file"):
        profile_activations(*arguments[:2], 3, path, print)
    with pytest.raises(ValueError, match="statistics of the detector"):
        profile_activations(tiny_detector(1), *arguments[1:], print)


def test_files_that_are_no_statistics_are_refused(coco, tmp_path):
    good = profile(coco, tmp_path / "good.safetensors")
    bad = tmp_path / "bad.safetensors"
    with pytest.raises(FileNotFoundError, match=r"bad\.safetensors"):
        load_profile(bad, "")
    bad.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        load_profile(bad, "")
    safetensors.numpy.save_file({"a": np.zeros(1)}, bad)
    with pytest.raises(ValueError, match="does not hold activation statistics"):
        load_profile(bad, "")
    del good.statistics["decoder.0"]
    save_profile(good, bad)
    with pytest.raises(ValueError, match=r"decoder\.0"):
        load_profile(bad, good.fingerprint)


def test_kinds_of_tokens(coco):
    model = tiny_detector()
    for batch in batches(CocoDataset(coco, "val2017"), model.config.preprocessing, 2):
        (kinds,) = object_tokens(batch, model)
        rows, columns = model.token_grids(batch.pixel_mask.shape[1:])[0]
        targets = query_targets(batch, model.config.queries)
        for i, (boxes, mask) in enumerate(zip(batch.boxes, batch.pixel_mask, strict=False)):
            height, width = mask[:, 0].sum(), mask[0].sum()
            scale = np.array([width, height, width, height]) / batch.sizes[i, [1, 0, 1, 0]]
            for t, kind in enumerate(kinds[i]):
                x, y = (t % columns + 0.5) * 8, (t // columns + 0.5) * 8
                inside = [x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in boxes * scale]
                assert kind == any(inside)
            assert kinds.shape == (2, rows * columns)
            corners = targets.boxes[i, : len(boxes)] @ np.array(
                [[1, 0, 1, 0], [0, 1, 0, 1], [-0.5, 0, 0.5, 0], [0, -0.5, 0, 0.5]]
            )
            size = batch.sizes[i, [1, 0, 1, 0]]
            np.testing.assert_allclose(sorted((corners * size).tolist()), sorted(boxes.tolist()), atol=1e-3)
        assert (kinds[~batch.valid] == -1).all()


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_earlier_versions_are_read(coco, tmp_path, version):
    good, path = profile(coco, tmp_path / "good.safetensors"), tmp_path / "old.safetensors"
    with safe_open(tmp_path / "good.safetensors", framework="numpy") as file:
        header = file.metadata() | {"format_version": str(version)}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    header["description"] = json.dumps(json.loads(header["description"]) | {"group_size": 4})
    if version == 1:
        arrays |= {"encoder.0.group_norms": np.zeros((2, 8)), "decoder.0.input_magnitudes": np.zeros((2, 3))}
    safetensors.numpy.save_file(arrays, path, metadata=header)
    assert_equal(good, load_profile(path, good.fingerprint))
    assert_equal(good, profile(coco, path))  # nothing is measured again
