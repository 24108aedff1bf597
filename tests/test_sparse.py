"""A detector with a plan: called like the dense one, looked into, changed."""

import dataclasses
import json

import huggingface_hub
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from PIL import Image
from tiny import TINY_CONFIG, tiny_detector

import detr_jax
from detr_jax.evaluation.inspection import describe
from detr_jax.kernels import Execution
from detr_jax.methods import (
    LinearGate,
    LowRankCompensation,
    Oracle,
    PartitionedSelector,
    Pooled,
    Random,
    Thresholded,
    TopK,
    low_rank_factors,
)

CAPABILITY = "of compute capability 9.0, not unknown"
NAMES = TINY_CONFIG.ffn_names
RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (*size, 3), np.uint8) for size in ((32, 40), (50, 32), (32, 40))]


def gates(seed: int = 0) -> dict[str, Thresholded]:
    rng = np.random.default_rng(seed)
    return {
        name: Thresholded(LinearGate(jnp.float32(rng.standard_normal((16, 8))), jnp.zeros(8)), jnp.float32(0))
        for name in NAMES
    }


def plan_of(model, selectors, orders=None) -> detr_jax.Plan:
    return detr_jax.Plan("mgs", detr_jax.fingerprint(model), selectors, orders or {}, {"epochs": 1}, {"AP": 0.5}, {})


@pytest.fixture(scope="module")
def dense():
    return tiny_detector()


@pytest.fixture(scope="module")
def plan(dense):
    order = np.random.default_rng(1).permutation(TINY_CONFIG.encoder_ffn_dim)
    return plan_of(dense, gates(), {"encoder.0": order})


@pytest.fixture(scope="module")
def sparse(dense, plan):
    return detr_jax.load_sparse(dense, plan)


@pytest.fixture(scope="module")
def pixels():
    return detr_jax.preprocess_images([IMAGES[0], IMAGES[2]], TINY_CONFIG.preprocessing)


@jax.jit
def call(model, pixel_values, pixel_mask):
    return model(pixel_values, pixel_mask)


def assert_same(one, other, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), one, other)


def test_it_is_called_like_the_dense_one(dense, plan, sparse, pixels):
    by_hand = jax.jit(lambda model, selectors: model(*pixels, selectors=selectors))
    expected = by_hand(dense.with_permutations(plan.permutations), plan.selectors)
    outputs = call(sparse, *pixels)
    assert_same(outputs, expected)
    assert type(outputs) is detr_jax.DetrOutputs
    assert not np.allclose(outputs.logits, call(dense, *pixels).logits)
    assert_same(by_hand(sparse, {}), call(dense, *pixels))
    assert (sparse.config, sparse.dtype) == (dense.config, dense.dtype)


def test_the_detector_does_not_change(dense, plan, sparse):
    assert detr_jax.fingerprint(dense) == plan.fingerprint == detr_jax.fingerprint(sparse.dense)
    assert detr_jax.fingerprint(sparse.detector) != plan.fingerprint  # its neurons are in the plan's order


def test_it_goes_through_transformations(sparse, pixels):
    pixel_values, pixel_mask = pixels
    expected = call(sparse, *pixels).logits

    mapped = jax.jit(jax.vmap(lambda values, mask: sparse(values[None], mask[None]).logits[0]))(*pixels)
    np.testing.assert_allclose(mapped, expected, atol=1e-5)

    mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,))
    sharded = jax.jit(
        jax.shard_map(
            lambda model, values, mask: model(values, mask).logits,
            mesh=mesh,
            in_specs=(P(), P("batch"), P("batch")),
            out_specs=P("batch"),
            check_vma=False,
        )
    )
    np.testing.assert_allclose(sharded(sparse, *pixels), expected, atol=1e-5)

    def loss(model, values):
        return model(values, pixel_mask).logits.sum()

    by_pixels = jax.jit(jax.grad(loss, 1))(sparse, jnp.asarray(pixel_values))
    assert by_pixels.shape == pixel_values.shape and jnp.abs(by_pixels).max() > 0
    silent = sparse.with_threshold(1.0)
    by_parameters = jax.jit(
        jax.grad(lambda detector: loss(dataclasses.replace(silent, detector=detector), pixel_values))
    )
    ffn = by_parameters(silent.detector).transformer.encoder[0].ffn
    assert not jnp.any(ffn.w_in[...]) and jnp.any(ffn.b_out[...])


def test_it_is_a_pytree(sparse, pixels):
    copy = jax.tree.map(lambda leaf: leaf, sparse)
    assert (copy.plan.method, copy.plan.measured) == ("mgs", {"AP": 0.5})
    assert list(copy.plan.permutations) == ["encoder.0"]
    reloaded = detr_jax.load_sparse(tiny_detector(), plan_of(tiny_detector(), gates(), sparse.plan.permutations))
    call(sparse, *pixels)
    compiled = call._cache_size()
    assert_same(call(reloaded, *pixels), call(sparse, *pixels))
    assert call._cache_size() == compiled
    other = dataclasses.replace(sparse.plan, measured={"AP": 0.4})
    assert jax.tree.structure(other) != jax.tree.structure(sparse.plan)
    assert jax.tree.structure(dataclasses.replace(sparse.plan, permutations={})) != jax.tree.structure(sparse.plan)


def test_thresholds(dense, sparse, pixels):
    everything = sparse.with_threshold(0.0)
    assert everything.detector is sparse.detector
    assert_same(call(everything, *pixels), call(dense, *pixels))
    assert everything.plan.measured == {} and everything.plan.training == sparse.plan.training
    one = sparse.with_threshold({"decoder.0": 0.75})
    assert [float(one.plan.selectors[name].threshold) for name in NAMES] == pytest.approx([0.0, np.log(3)])
    executed = sparse.with_implementation("xla").with_threshold(score=1.0).plan.selectors["encoder.0"]
    assert float(executed.selector.threshold) == 1 and executed.execution.implementation == "xla"


def test_thresholds_of_selectors_that_hold_others(dense):
    gate = gates()["encoder.0"]
    factors = low_rank_factors(dense.ffn_weights()["encoder.0"], 2)
    sparse = detr_jax.load_sparse(dense, plan_of(dense, {"encoder.0": LowRankCompensation(gate, factors)}))
    assert float(sparse.with_threshold(score=0.25).plan.selectors["encoder.0"].of.threshold) == 0.25


def test_thresholds_are_probabilities_or_scores(sparse):
    selectors = {"encoder.0": Thresholded(Random(4), jnp.float32(0)), "decoder.0": gates()["decoder.0"]}
    mixed = sparse.with_plan(dataclasses.replace(sparse.plan, selectors=selectors))
    assert float(mixed.with_threshold({"decoder.0": 0.5}).plan.selectors["decoder.0"].threshold) == 0
    with pytest.raises(ValueError, match=r"the score of Random is no probability.*score="):
        mixed.with_threshold(0.5)
    with pytest.raises(ValueError, match="takes a probability, or score="):
        mixed.with_threshold(0.5, score=0.5)
    pooled = Thresholded(Pooled(gates()["encoder.0"].score, odds=True), jnp.float32(0))
    shared = sparse.with_plan(dataclasses.replace(sparse.plan, selectors={"encoder.0": pooled}))
    assert float(shared.with_threshold(0.25).plan.selectors["encoder.0"].threshold) == 0.25


def test_selectors_of_a_plan_need_neurons_in_its_order(dense, sparse, plan, pixels):
    for run in (dense, jax.jit(lambda *held: dense(*held[:2], selectors=held[2]))):
        with pytest.raises(ValueError, match="hidden neurons in another order"):
            run(*pixels, selectors=plan.selectors) if run is dense else run(*pixels, plan.selectors)
    with pytest.raises(ValueError, match="hidden neurons in another order"):
        sparse(*pixels, selectors=dataclasses.replace(plan, permutations={}).selectors)
    permuted = dense.with_permutations(plan.permutations)
    assert_same(permuted(*pixels, selectors=plan.selectors), call(sparse, *pixels))
    twice = dense.with_permutations({"encoder.0": np.arange(32)[::-1]})
    order = np.argsort(np.arange(32)[::-1])[plan.permutations["encoder.0"]]
    assert twice.with_permutations({"encoder.0": order}).permutations == permuted.permutations
    unpermuted = plan_of(dense, gates())
    assert_same(sparse.dense(*pixels, selectors=unpermuted.selectors), dense(*pixels, selectors=gates()))


def test_its_repr_is_a_summary(sparse):
    text = repr(sparse.with_implementation("xla"))
    assert len(text.splitlines()) < 10 and "mgs, 2 FFNs sparse, 1 with permuted neurons" in text
    assert "implementation='xla'" in text and "masked" in repr(sparse)


@pytest.mark.parametrize("name", ["masked", "auto", "xla", "reference"])
def test_implementations_by_name(sparse, name):
    changed = sparse.with_implementation(Execution(4, 4)).with_implementation(name)
    assert changed.detector is sparse.detector
    selector = changed.plan.selectors["encoder.0"]
    if name == "masked":
        assert jax.tree.structure(selector) == jax.tree.structure(sparse.plan.selectors["encoder.0"])
    else:
        assert selector.execution == Execution(implementation=None if name == "auto" else name)


def test_an_empty_batch_gives_an_empty_result(dense):
    rng = np.random.default_rng(0)
    pooled = Pooled(LinearGate(jnp.float32(rng.standard_normal((16, 4))), jnp.zeros(4)), odds=False)
    selectors = {"encoder.0": Thresholded(pooled, jnp.float32(0)), "decoder.0": gates()["decoder.0"]}
    model = detr_jax.load_sparse(dense, plan_of(dense, selectors), implementation="auto")
    outputs = model(np.zeros((0, 40, 56, 3), np.float32))
    assert outputs.logits.shape == (0, 5, 4) and outputs.boxes.shape == (0, 5, 4)
    assert model.detections(outputs, np.zeros((0, 2))).boxes.shape == (0, 5, 4)
    layers = model.inspect(np.zeros((0, 40, 56, 3), np.float32))
    assert layers["encoder.0"].hidden.shape == (0, 35, 32)
    assert model.detect([]) == []


def test_what_was_measured_belongs_to_an_implementation(sparse):
    assert sparse.with_implementation("masked").plan.measured == {"AP": 0.5}  # as it was
    other = sparse.with_implementation("xla")
    assert other.plan.measured == {} and other.plan.training == sparse.plan.training
    own = dataclasses.replace(other.plan, measured={"AP": 0.4})
    assert other.with_plan(own).with_implementation("xla").plan.measured == {"AP": 0.4}


def test_the_report_says_how_ffns_are_computed(sparse, pixels, monkeypatch):
    masked = sparse.execution_report((32, 40))
    assert tuple(masked) == NAMES and {str(execution) for execution in masked.values()} == {"masked"}
    parts = {"encoder.0": PartitionedSelector(Thresholded(Random(4), jnp.float32(-0.5)), always=8, gated=16)}
    some = sparse.with_plan(dataclasses.replace(sparse.plan, selectors=parts)).with_implementation("xla")
    report = some.execution_report((32, 40))
    assert str(report["encoder.0"]) == "xla, images, blocks of 4 neurons, 24 neurons at most"
    assert report["decoder.0"].implementation == "dense"
    json.dumps({name: dataclasses.asdict(execution) for name, execution in report.items()})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    auto = sparse.with_implementation("auto").execution_report((32, 40))
    assert auto["encoder.0"].refused == (("mosaic_gpu", f"it runs on Hopper GPUs, {CAPABILITY}"),)
    text = describe(auto)
    assert text.startswith("encoder.0, decoder.0: xla, images, blocks of 4 neurons") and "; not mosaic_gpu: " in text
    monkeypatch.undo()
    assert some.inspect(*pixels)["encoder.0"].execution == report["encoder.0"]


def test_exact_execution_is_the_masked_reference(sparse, pixels):
    exact = sparse.with_implementation(Execution(4, 4, exact=True, implementation="xla"))
    assert_same(call(exact, *pixels), call(sparse, *pixels))


def test_other_plans(dense, sparse, plan, pixels, tmp_path):
    edited = dataclasses.replace(plan, selectors={"decoder.0": Oracle(4)})
    assert sparse.with_plan(edited).detector is sparse.detector
    in_another_order = plan_of(dense, gates(3), {"decoder.0": np.arange(32)[::-1]})
    changed = sparse.with_plan(in_another_order)
    assert_same(call(changed, *pixels), call(detr_jax.load_sparse(dense, in_another_order), *pixels))
    detr_jax.save_plan(in_another_order, tmp_path / "other.safetensors")
    from_file = sparse.with_plan(tmp_path / "other.safetensors")
    assert detr_jax.fingerprint(from_file.detector) == detr_jax.fingerprint(changed.detector)


def test_where_detectors_and_plans_come_from(dense, plan, tmp_path, monkeypatch):
    detr_jax.save(dense, tmp_path / "model.safetensors")
    detr_jax.save_plan(plan, tmp_path / "plan.safetensors")
    found = [
        detr_jax.load_sparse(tmp_path),
        detr_jax.load_sparse(tmp_path / "model.safetensors", tmp_path / "plan.safetensors"),
        detr_jax.load_sparse(str(tmp_path / "model.safetensors"), plan, implementation="auto"),
        detr_jax.load_sparse(dense, str(tmp_path)),
    ]
    asked = []

    def download(repository, filename, *, revision):
        asked.append((repository, filename, revision))
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, **_: str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found += [detr_jax.load_sparse("someone/detr-pets"), detr_jax.load_sparse(dense, "someone/plans")]
    assert asked == [(name, "plan.safetensors", None) for name in ("someone/detr-pets", "someone/plans")]
    assert detr_jax.load_plan("someone/plans", dense, revision="v2").method == "mgs"
    assert asked[-1] == ("someone/plans", "plan.safetensors", "v2")
    assert {detr_jax.fingerprint(sparse.dense) for sparse in found} == {plan.fingerprint}
    assert [sparse.plan.selectors["encoder.0"].__class__.__name__ for sparse in found].count("Executed") == 1


def test_plans_go_to_the_hub(dense, plan, tmp_path, monkeypatch):
    """A stub of the hub's client that keeps repositories in a folder."""

    class Hub:  # its addresses must be of the hub, for the client reads them
        def create_repo(self, repository, *, private, exist_ok):
            assert exist_ok
            (tmp_path / repository).mkdir(parents=True, exist_ok=True)

        def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, commit_message):
            (tmp_path / repo_id / path_in_repo).write_bytes(path_or_fileobj.read_bytes())
            return huggingface_hub.CommitInfo(f"https://huggingface.co/{repo_id}/commit/1", commit_message, "", "1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repository, name, revision: str(tmp_path / repository / name)
    )
    assert detr_jax.push_plan(plan, "someone/plans") == "https://huggingface.co/someone/plans/commit/1"
    pulled = detr_jax.load_plan("someone/plans", dense)
    assert jax.tree.structure(pulled) == jax.tree.structure(plan)
    jax.tree.map(np.testing.assert_array_equal, pulled, plan)

    def refused(*_, **__):
        raise RuntimeError("401 Client Error")

    monkeypatch.setattr(Hub, "upload_file", refused)
    with pytest.raises(OSError, match=r"plan.safetensors could not be pushed to someone/plans: 401.*\n.*hf auth login"):
        detr_jax.push_plan(plan, "someone/plans")


def test_inspection(sparse, pixels):
    padded = detr_jax.preprocess_images(IMAGES, TINY_CONFIG.preprocessing)
    layers = sparse.inspect(*padded)
    assert tuple(layers) == NAMES
    encoder, decoder = layers.values()
    ((rows, columns),) = encoder.grids
    assert encoder.hidden.shape == encoder.kept.shape == (3, rows * columns, 32)
    assert decoder.grids == () and decoder.hidden.shape == (3, 5, 32)
    assert not encoder.tokens.all() and decoder.tokens.all()
    traces = jax.jit(lambda model: model(*padded, trace=True).traces)(sparse)
    np.testing.assert_allclose(encoder.hidden, traces["encoder.0"].hidden, atol=1e-5)
    tokens = np.asarray(encoder.tokens)
    np.testing.assert_allclose(encoder.density, np.asarray(encoder.kept)[tokens].mean(), rtol=1e-6)
    np.testing.assert_allclose(encoder.firing, (np.asarray(encoder.hidden)[tokens] > 0).mean(), rtol=1e-6)
    fires = np.asarray(encoder.fires)
    np.testing.assert_allclose(encoder.recall, np.asarray(encoder.kept)[fires].mean(), rtol=1e-6)
    assert float(encoder.executed) == 1.0


def test_what_the_execution_computes(sparse, pixels):
    # Random groups differ from token to token, as gates of random parameters hardly do.
    lots = dict.fromkeys(NAMES, Thresholded(Random(4), jnp.float32(-0.2)))
    few = sparse.with_plan(dataclasses.replace(sparse.plan, selectors=lots))
    layer = few.with_implementation(Execution(4, 4, implementation="xla")).inspect(*pixels)["encoder.0"]
    tiles = np.asarray(layer.kept).reshape(2, -1, 4, 8, 4)
    assert 0 < layer.density < layer.executed < 1
    np.testing.assert_allclose(layer.executed, tiles.any((2, 4)).mean(), rtol=1e-6)
    in_sections = PartitionedSelector(Thresholded(Random(4), jnp.float32(-0.5)), always=8, gated=16)
    parts = sparse.with_plan(dataclasses.replace(sparse.plan, selectors={"encoder.0": in_sections}))
    layer = parts.with_implementation(Execution(4, 4, implementation="xla")).inspect(*pixels)["encoder.0"]
    tiles = np.asarray(layer.kept).reshape(2, -1, 4, 8, 4).any((2, 4))
    assert tiles[..., :2].all() and 0 < tiles[..., 2:6].mean() < 1 and not tiles[..., 6:].any()
    np.testing.assert_allclose(layer.executed, tiles.mean(), rtol=1e-6)
    assert float(parts.with_threshold(score=-2.0).inspect(*pixels)["encoder.0"].density) == 0.75
    # Where nearly everything is needed, the dense FFN is faster.
    most = sparse.with_implementation("auto").inspect(*pixels)["encoder.0"]
    assert float(most.executed) == 1 > most.density


def test_detection_in_images_of_all_kinds(sparse, dense, tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    kinds = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(IMAGES[0]), IMAGES[0], jnp.asarray(IMAGES[0])]
    expected = sparse.detect(IMAGES[0], 0.0)
    assert expected.boxes.shape == (5, 4) and list(expected.scores) == sorted(expected.scores, reverse=True)
    assert [TINY_CONFIG.labels[label] for label in expected.labels] == list(expected.names)
    for found in sparse.detect([*kinds, IMAGES[1]], 0.0)[:-1]:
        np.testing.assert_array_equal(found.boxes, expected.boxes)
    assert isinstance(sparse.detect(kinds[0], 0.0), detr_jax.ImageDetections)
    in_one_array = sparse.detect(np.stack([IMAGES[0], IMAGES[2]]), 0.0)
    assert len(in_one_array) == 2
    np.testing.assert_array_equal(in_one_array[0].boxes, expected.boxes)
    assert sparse.detect([], 0.5) == []
    assert len(sparse.detect(IMAGES[0], 1.0)) == 0
    one, other = sparse.with_threshold(0.0).detect(IMAGES[0], 0.0), detr_jax.detect(dense, IMAGES[0], 0.0)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


def test_the_figure_shows_every_layer(sparse, tmp_path):
    backend = dict.__getitem__(matplotlib.rcParams, "backend")  # looking it up the usual way would choose one
    sparse.draw_activity(IMAGES[0], tmp_path / "firing.png", threshold=0.0)
    with Image.open(tmp_path / "firing.png") as figure:
        assert figure.width > 500 and figure.height > 300
        assert len(figure.convert("RGB").getcolors(10**7)) > 100
    assert dict.__getitem__(matplotlib.rcParams, "backend") == backend  # a notebook keeps its own


def test_top_k_has_no_threshold(dense):
    sparse = detr_jax.load_sparse(dense, plan_of(dense, {"encoder.0": TopK(gates()["encoder.0"].score, jnp.int32(2))}))
    with pytest.raises(ValueError, match="TopK decides by no threshold"):
        sparse.with_threshold(0.5)
