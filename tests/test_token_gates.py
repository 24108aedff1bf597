"""Token gates: what layers update, labels, training, and plans with them beside selectors of FFNs."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export
from test_architectures import CONFIGS
from tiny import TINY_CONFIG, annotation, tiny_detector, write_coco

import detr_jax
from detr_jax.data.coco import CocoDataset
from detr_jax.data.features import backbone_features
from detr_jax.errors import ExistingFileError, InputError
from detr_jax.methods import GatedTokens, HiddenMagnitude, Thresholded, TokenGates
from detr_jax.methods.token_gates import LevelTokenScore, LinearTokenScore, RandomTokenScore, most_important
from detr_jax.models.token_selection import is_kept, kept_tokens, put_tokens, take_tokens

CONFIGS = {"detr": TINY_CONFIG} | CONFIGS
LAYERS = {"encoder_layers": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    sizes = [(32, 40), (40, 32), (32, 32), (36, 36)]
    annotations = [annotation(i, i, (2, 2, 12, 9)) for i in range(1, 5)]
    return CocoDataset(write_coco(tmp_path_factory.mktemp("coco"), sizes, annotations), "val2017")


SLOW = ("pre-norm", "conditional")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CONFIGS]
)
def model(request):
    return tiny_detector(config=dataclasses.replace(CONFIGS[request.param], **LAYERS))


@pytest.fixture(scope="module")
def features(model, data):
    return next(iter(backbone_features(model, data, 2, None))).tokens


def transform(model, features, selectors=None, **options):
    return jax.jit(lambda features, selectors: model.transform(features, selectors=selectors, **options))(
        features, selectors
    )


def test_rows_are_taken_and_put_back():
    array = jnp.arange(24.0).reshape(2, 4, 3)
    rows = jnp.array([[2, 0], [1, 3]])
    taken = take_tokens(array, rows)
    np.testing.assert_array_equal(taken, [array[0, [2, 0]], array[1, [1, 3]]])
    np.testing.assert_array_equal(take_tokens(array[..., 0], rows), taken[..., 0])
    np.testing.assert_array_equal(put_tokens(jnp.zeros_like(array), rows, taken), array * is_kept(rows, 4)[..., None])


def test_padding_comes_last_and_sets_are_nested():
    tokens = jnp.array([[True, True, True, False, True]])
    x = jnp.array([[3.0, 1.0, 2.0, 9.0, 0.0]])[..., None]
    gates = GatedTokens(LinearTokenScore(jnp.ones(1), jnp.zeros(())), (0.5, 0.2))
    kept = kept_tokens(gates, x, tokens, (5,), 2)
    assert kept.counts == (3, 1)
    assert kept.of_layer(0).tolist() == [[0, 1, 2]] and kept.of_layer(1).tolist() == [[0]]
    assert kept_tokens(gates.keeping(1.0), x, tokens, (5,), 2).order.tolist() == [[0, 2, 1, 4, 3]]


def test_coarse_levels_come_first():
    tokens = jnp.ones((2, 7), bool)
    kept = kept_tokens(GatedTokens(LevelTokenScore(), (3 / 7,)), jnp.zeros((2, 7, 1)), tokens, (4, 2, 1), 1)
    assert kept.order.tolist() == [[6, 4, 5]] * 2


def test_all_tokens_are_the_dense_detector(model, features):
    dense = transform(model, features)
    found = transform(model, features, {"encoder": GatedTokens(RandomTokenScore(), (1.0,))})
    np.testing.assert_allclose(found.logits, dense.logits, atol=2e-5)
    np.testing.assert_allclose(found.boxes, dense.boxes, atol=2e-5)


def test_layers_update_the_kept_tokens_only(model, features):
    """Computed for these alone, it is what the whole layer gives where the others are put back."""
    gates = GatedTokens(RandomTokenScore(1), (0.6, 0.3))
    x, tokens, levels = model.encoder_inputs(features)
    kept = kept_tokens(gates, x, tokens, levels, 2)
    found = transform(model, features, {"encoder": gates})
    dense = transform(model, features)
    assert np.abs(found.logits - dense.logits).max() > 1e-4

    masks = [is_kept(kept.of_layer(layer), x.shape[1]) for layer in range(2)]
    assert [int(mask[0].sum()) for mask in masks] == list(kept.counts)
    traced = transform(model, features, {"encoder": gates}, trace=True)
    np.testing.assert_allclose(traced.logits, found.logits, atol=2e-5)
    for layer, mask in enumerate(masks):
        trace = traced.traces[f"encoder.{layer}"]
        np.testing.assert_array_equal(trace.tokens, mask & tokens & features.valid[:, None])


def test_gates_and_selectors_of_ffns_multiply(model, features):
    ffns = {name: Thresholded(HiddenMagnitude(weighted=False), jnp.float32(0.3)) for name in model.ffn_specs()}
    gates = {"encoder": GatedTokens(RandomTokenScore(1), (0.5,))}
    both = transform(model, features, ffns | gates)
    traced = transform(model, features, ffns | gates, trace=True)
    np.testing.assert_allclose(both.logits, traced.logits, atol=2e-5)
    for one in (ffns, gates):
        assert np.abs(both.logits - transform(model, features, one).logits).max() > 1e-5


def test_labels(model, features):
    _, tokens, _ = model.encoder_inputs(features)
    attention = jax.jit(lambda f: model.token_importance(f, "attention"))(features)
    update = jax.jit(lambda f: model.token_importance(f, "update"))(features)
    assert attention.shape == update.shape == tokens.shape
    assert (np.asarray(attention)[~np.asarray(tokens)] < 1e-6).all()
    config = model.config
    mass = config.decoder_layers * config.decoder_heads * model.queries
    if "levels" in vars(config):  # samples outside of the image have no cell
        assert (attention.sum(1) <= mass * 1.001).all() and (attention.sum(1) > 0).all()
    else:
        np.testing.assert_allclose(attention.sum(1), mass, rtol=1e-4)
    steps = jax.jit(lambda f: model.encoder_steps(f))(features)
    expected = sum(np.linalg.norm(after - before, axis=-1) for before, after in itertools.pairwise(steps))
    np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-5)
    wanted = most_important(attention, tokens, 0.25)
    np.testing.assert_array_equal(wanted.sum(1), np.ceil(0.25 * tokens.sum(1)))
    lowest = jnp.where(wanted, attention, jnp.inf).min(1, keepdims=True)
    assert not (tokens & ~wanted & (attention > lowest)).any()


@pytest.mark.parametrize("scorer", ["linear", "sparse-detr", "levels", "random"])
def test_a_plan_with_token_gates(scorer, data, tmp_path):
    model = tiny_detector(config=dataclasses.replace(TINY_CONFIG, **LAYERS))
    before = detr_jax.fingerprint(model)
    gates = TokenGates(keep=(0.5, 0.25), scorer=scorer, epochs=2, labels="update")
    sparse = detr_jax.gate_tokens(model, data, gates, batch_size=2, folder=tmp_path / "run", progress=False)
    assert detr_jax.fingerprint(model) == detr_jax.fingerprint(sparse.dense) == before
    loaded = detr_jax.load_sparse(model, tmp_path / "run/plan.safetensors")
    image = data[0].image
    np.testing.assert_array_equal(loaded.detect(image, 0.0).boxes, sparse.detect(image, 0.0).boxes)
    assert loaded.plan.training["token gates"]["scorer"] == scorer
    scores = detr_jax.evaluate(loaded, data, batch_size=2, progress=False)
    assert scores.tokens["decoder.0"] == 1
    assert 0.25 <= scores.tokens["encoder.1"] < scores.tokens["encoder.0"] <= 0.75  # of those that are no padding
    assert "tokens updated: encoder.0" in str(scores)
    with pytest.raises(ExistingFileError, match="holds a finished run"):
        detr_jax.gate_tokens(model, data, gates, batch_size=2, folder=tmp_path / "run", progress=False)


def test_with_gates_of_ffns_in_one_plan(data, tmp_path):
    model = tiny_detector()
    method = detr_jax.methods.MGS(group_size=4, epochs=1)
    options = detr_jax.FitOptions(batch_size=2)
    budget = detr_jax.Density(0.5)
    sparse = detr_jax.sparsify(model, data, method, budget, calibration=2, options=options, progress=False)
    both = detr_jax.gate_tokens(sparse, data, TokenGates(keep=(0.5,), epochs=1), batch_size=2, progress=False)
    assert set(both.plan.selectors) == {*model.ffn_specs(), "encoder"} and both.plan.method == "mgs"
    detr_jax.save_plan(both.plan, tmp_path / "plan.safetensors")
    loaded = detr_jax.load_sparse(model, tmp_path / "plan.safetensors")
    auto = loaded.with_implementation("xla").with_threshold(0.3)
    assert auto.plan.selectors["encoder"].keep == (0.5,)
    image = data[0].image
    assert set(auto.inspect(*detr_jax.preprocess_images(image, model.preprocessing))) == set(model.ffn_specs())
    without = loaded.with_tokens(None)
    assert set(without.plan.selectors) == set(model.ffn_specs())
    np.testing.assert_array_equal(without.detect(image, 0.0).scores, sparse.detect(image, 0.0).scores)
    assert "2 FFNs sparse" in repr(both)


def test_an_exported_detector_chooses_the_same_tokens(data, tmp_path):
    model = tiny_detector()
    sparse = detr_jax.gate_tokens(model, data, TokenGates(keep=(0.5,), epochs=1), batch_size=2, progress=False)
    detr_jax.export(sparse, tmp_path / "tiny.stablehlo", size=(32, 40))
    described = json.loads((tmp_path / "tiny.stablehlo.json").read_text())
    assert described["ffns"]["encoder"] == "chosen tokens gathered"
    served = jax_export.deserialize(bytearray((tmp_path / "tiny.stablehlo").read_bytes()))
    pixels, sizes = data[0].image[None], np.array([[32, 40]], np.int32)
    found = served.call(pixels, sizes)
    expected = sparse.detect(data[0].image, 0.0)
    np.testing.assert_allclose(np.sort(found["scores"][0]), np.sort(expected.scores), atol=1e-5)


def test_training_finds_what_it_looks_for(data):
    """Tokens that a linear map can tell apart: the loss falls below that of guessing."""
    model = tiny_detector()
    gates = TokenGates(keep=(0.5,), epochs=40, learning_rate=0.05, labels="update")
    sparse = detr_jax.gate_tokens(model, data, gates, batch_size=4, progress=False)
    found, wanted = [], []
    for batch in backbone_features(model, data, 4, None):
        x, tokens, levels = model.encoder_inputs(batch.tokens)
        found.append(sparse.plan.selectors["encoder"].score(x, tokens, levels)[tokens] > 0)
        wanted.append(most_important(model.token_importance(batch.tokens, "update"), tokens, 0.5)[tokens])
    assert (np.concatenate(found) == np.concatenate(wanted)).mean() > 0.75


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": ()}, "shares of tokens are above 0 and at most 1, at least one of them"),
        ({"keep": (0.0,)}, "above 0 and at most 1"),
        ({"label_share": 1.5}, "above 0 and at most 1"),
        ({"scorer": "focus"}, "scorer must be one of linear, sparse-detr, levels, random, not 'focus'"),
        ({"labels": "boxes"}, "labels must be one of attention, update, not 'boxes'"),
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        TokenGates(**options)


def test_gates_that_do_not_fit_are_refused(data):
    model = tiny_detector()
    with pytest.raises(InputError, match="3 shares of tokens to keep for 1 encoder layers"):
        detr_jax.gate_tokens(model, data, TokenGates(keep=(0.5, 0.4, 0.3)), progress=False)
    sparse = detr_jax.gate_tokens(model, data, TokenGates(scorer="levels"), progress=False)
    with pytest.raises(InputError, match="the selector of tokens does not fit the encoder"):
        sparse.with_tokens(GatedTokens(LinearTokenScore(jnp.zeros(7), jnp.zeros(())), (0.5,)))
    with pytest.raises(InputError, match="holds NaN or infinite"):
        sparse.with_tokens(GatedTokens(LinearTokenScore(jnp.full(16, jnp.nan), jnp.zeros(())), (0.5,)))
