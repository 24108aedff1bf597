"""What the model accepts and returns; that it is right is for the parity tests."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from flax import nnx
from jaxtyping import TypeCheckError, jaxtyped
from tiny import TINY_CONFIG, outputs, tiny_detector

from detr_jax.methods import Oracle
from detr_jax.models import DETR, Preprocessing, preset_config
from detr_jax.models.registry import config_from_json

embed, transform = jax.jit(DETR.embed), jax.jit(DETR.transform)


@pytest.fixture(scope="module")
def model():
    return tiny_detector()


def images(height=40, width=56, seed=0):
    return np.random.default_rng(seed).standard_normal((2, height, width, 3)).astype(np.float32)


def test_outputs_have_the_shapes_that_were_promised(model):
    found = outputs(model, images(), auxiliary=True, trace=True)
    assert found.logits.shape == (2, 5, 4) and found.boxes.shape == (2, 5, 4)
    assert found.auxiliary == ()  # there is one decoder layer only
    rows, columns = model.token_grids((40, 56))[0]
    assert [tokens.shape for tokens in found.encoder] == [(2, rows * columns, 16)] * 2
    assert found.traces["encoder.0"].hidden.shape == (2, rows * columns, 32)
    assert found.traces["decoder.0"].inputs.shape == (2, 5, 16)


def test_odd_sizes_fill_the_token_grid(model):
    assert model.token_grids((33, 41)) == ((5, 6),)
    assert outputs(model, images(33, 41), trace=True).traces["encoder.0"].tokens.shape == (2, 30)


def test_a_trace_holds_what_the_ffn_computes(model):
    trace = outputs(model, images(), trace=True).traces["encoder.0"]
    ffn = model.transformer.encoder[0].ffn
    hidden = np.maximum(np.asarray(trace.inputs) @ np.asarray(ffn.w_in[...]).T + ffn.b_in[...], 0)
    np.testing.assert_allclose(trace.hidden, hidden, atol=1e-5)


def test_padding_does_not_reach_what_is_masked(model):
    mask = np.zeros((2, 40, 56), bool)
    mask[:, :32, :40] = True
    tokens = outputs(model, images(), mask, trace=True).traces["encoder.0"].tokens
    np.testing.assert_array_equal(tokens.reshape(2, 5, 7)[0].sum(1), [5, 5, 5, 5, 0])

    x, positions = np.random.default_rng(1).standard_normal((2, *tokens.shape, 16)).astype(np.float32)
    disturbed = np.where(tokens[..., None], x, 1e3)
    run, _ = model.ffn_runner(None, np.ones(2, bool), trace=False)
    memories = [model.transformer.encode(features, positions, tokens, run) for features in (x, disturbed)]
    np.testing.assert_array_equal(*(np.asarray(memory)[np.asarray(tokens)] for memory in memories))
    assert np.abs(memories[0] - memories[1]).max() > 0.1
    np.testing.assert_array_equal(*(model.transformer.decode(m, positions, tokens, run)[-1] for m in memories))


def test_embedding_then_transforming_is_the_whole_detector(model):
    mask = np.ones((2, 40, 56), bool)
    mask[0, :, 40:] = False
    whole = outputs(model, images(), mask)
    parts = transform(model, embed(model, images(), mask, np.ones(2, bool)))
    np.testing.assert_allclose(parts.logits, whole.logits, atol=1e-5)
    np.testing.assert_allclose(parts.boxes, whole.boxes, atol=1e-5)


def test_images_that_only_fill_the_batch_have_no_tokens_in_traces(model):
    tokens = embed(model, images(), np.ones((2, 40, 56), bool), np.array([True, False]))
    traces = jax.jit(DETR.traces)(model, tokens, {"decoder.0": Oracle(8)})
    for trace in traces.values():
        np.testing.assert_array_equal(trace.tokens.all(1), [True, False])
        np.testing.assert_array_equal(trace.tokens.any(1), [True, False])
    assert traces["encoder.0"].selection.active is None
    fires = np.asarray(traces["decoder.0"].hidden).reshape(2, 5, 4, 8) > 0
    np.testing.assert_array_equal(traces["decoder.0"].selection.active, fires.any(-1))


def test_bfloat16_outputs_are_float32(model):

    shapes = jax.eval_shape(lambda x: DETR(TINY_CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(x), images())
    assert shapes.logits.dtype == shapes.boxes.dtype == jnp.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((40, 56, 3)),), r"pixel_values must be \(batch, height, width, 3\), got \(40, 56, 3\)"),
        ((np.zeros((1, 3, 40, 56)),), r"got \(1, 3, 40, 56\)"),
        ((images(), np.ones((2, 56, 40), bool)), r"pixel_mask must be \(2, 40, 56\) like pixel_values"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_shapes_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(*arguments)


def test_a_selector_for_an_unknown_ffn_is_refused(model):
    with pytest.raises(ValueError, match=r"no FFN is named \['encoder.7'\]"):
        outputs(model, images(), selectors={"encoder.7": Oracle(8)})


def test_an_empty_batch_gives_empty_outputs(model):
    found = outputs(model, np.zeros((0, 40, 56, 3), np.float32), trace=True)
    assert found.logits.shape == (0, 5, 4) and found.boxes.shape == (0, 5, 4)
    assert found.traces["encoder.0"].hidden.shape == (0, 35, 32)
    assert model.detections(found, np.zeros((0, 2))).boxes.shape == (0, 5, 4)


def test_shapes_are_as_annotated(model):
    names = ("embed", "detections", "heads")
    checked = {name: jax.jit(jaxtyped(typechecker=beartype)(getattr(DETR, name))) for name in names}
    pixels, mask = jnp.asarray(images()), jnp.ones((2, 40, 56), bool)
    tokens = checked["embed"](model, pixels, mask, jnp.ones(2, bool))
    assert checked["detections"](model, transform(model, tokens), jnp.ones((2, 2), jnp.int32)).boxes.shape == (2, 5, 4)
    assert checked["heads"](model, tokens.x)[1].shape == (2, 35, 4)
    with pytest.raises(TypeCheckError):
        checked["embed"](model, pixels, mask[:, :32], jnp.ones(2, bool))


def test_files_of_version_1_had_one_size_for_encoder_and_decoder():
    values = {"backbone": {"depths": [2, 2, 2]}, "heads": 4, "ffn_features": 64, "shortest_side": 128}
    config = config_from_json("detr", values | {"longest_side": 213})
    assert (config.encoder_heads, config.decoder_heads) == (4, 4)
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim) == (64, 64)
    assert config.preprocessing == Preprocessing(128, 213, stride=config.backbone.stride)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="no preset named 'detr-r18'; there are detr-r50"):
        preset_config("detr-r18")


@pytest.mark.parametrize("name", ["detr-r50", "detr-r101-dc5", "detr-tiny"])
def test_a_configuration_survives_json(name):
    config = preset_config(name)
    assert config_from_json("detr", json.loads(json.dumps(dataclasses.asdict(config)))) == config
