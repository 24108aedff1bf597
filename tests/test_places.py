"""Densities by place: equal to counting token by token, and adding up to those of whole FFNs."""

import numpy as np
import pytest
from test_architectures import CONFIGS
from tiny import annotation, outputs, tiny_detector, write_coco

import detr_jax
from detr_jax.data.coco import CocoDataset
from detr_jax.data.loading import batches
from detr_jax.evaluation.places import density_by_place, places_of
from detr_jax.methods import Random, Thresholded


@pytest.fixture(scope="module")
def model():
    return tiny_detector(config=CONFIGS["deformable"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    sizes = [(32, 40), (40, 32), (32, 40)]
    boxes = [annotation(1, 1, (0, 0, 20, 9)), annotation(2, 2, (10, 4, 12, 30))]  # none in the third
    return CocoDataset(write_coco(tmp_path_factory.mktemp("coco"), sizes, boxes), "val2017")


def test_shares_of_places_are_those_of_their_tokens(model, data):
    selectors = {name: Thresholded(Random(4), np.float32(-0.5)) for name in model.ffn_specs()}
    found = density_by_place(model, data, 1, selectors, progress=None)
    assert list(found) == list(model.ffn_specs())
    names = places_of(model, model.ffn_specs()["encoder.0"])
    assert names == tuple(f"stride {s}, {kind}" for s in (4, 8, 16) for kind in ("background", "object"))
    assert set(found["decoder.0"]) == {"unmatched", "matched"}
    assert found["decoder.0"]["matched"].tokens == 2

    totals = {name: np.zeros(3) for name in names}
    for batch in batches(data, model.preprocessing, 1):
        trace = outputs(model, batch.pixel_values, batch.pixel_mask, selectors, trace=True).traces["encoder.0"]
        kept = np.asarray(trace.selection.active)
        first = 0
        for stride, (rows, columns) in zip(model.strides, model.token_grids(batch.pixel_mask.shape[1:]), strict=True):
            for row in range(rows):
                for column in range(columns):
                    x, y = (column + 0.5) * stride, (row + 0.5) * stride
                    scale = batch.pixel_mask[0, 0].sum() / batch.sizes[0, 1]
                    inside = any(
                        (b[:2] * scale <= (x, y)).all() and ((x, y) < b[2:] * scale).all() for b in batch.boxes[0]
                    )
                    token = first + row * columns + column
                    fires, computes = (trace.hidden[0, token] > 0).sum(), 4 * kept[0, token].sum()
                    if trace.tokens[0, token]:
                        totals[f"stride {stride}, {'object' if inside else 'background'}"] += (1, fires, computes)
            first += rows * columns
    for name, (tokens, fires, computes) in totals.items():
        place = found["encoder.0"][name]
        neurons = tokens * model.config.encoder_ffn_dim
        assert place.tokens == tokens > 0
        assert (place.fired, place.computed) == pytest.approx((fires / neurons, computes / neurons))


def test_places_add_up_whatever_the_batches(model, data):
    found = density_by_place(model, data, 2, progress=None)
    counts = detr_jax.evaluate(model, data, batch_size=1, group_size=4).counts
    for name, places in found.items():
        tokens = [place.tokens for place in places.values()]
        fired = np.average([place.fired for place in places.values()], weights=tokens)
        assert {place.computed for place in places.values() if place.tokens} == {1}
        assert fired == pytest.approx(1 - counts[name].zeros, abs=1e-3)
