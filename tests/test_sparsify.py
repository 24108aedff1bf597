"""`detr_jax.sparsify`: every method, every budget, run folders, and the same plan as by the command."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import run
from tiny import annotation, tiny_detector, write_coco

import detr_jax
from detr_jax import run_folder
from detr_jax.calibration.permutation import kmeans_permutation
from detr_jax.data.image_list import GivenImages
from detr_jax.errors import ExistingFileError, InputError
from detr_jax.methods import METHODS, MGS, LinearGate, TrainedMethod, Traits, storable
from detr_jax.training.budgets import GateTuning

OPTIONS = detr_jax.FitOptions(batch_size=4, statistics_images=8)


@pytest.fixture(scope="module")
def photographs():
    """Images without annotations."""
    rng = np.random.default_rng(0)
    return GivenImages([rng.integers(0, 256, (32, 40, 3), np.uint8) for _ in range(12)])


def small(name: str, **options):
    """A method with groups of 4, trained for one epoch if it is."""
    fields = {field.name for field in dataclasses.fields(METHODS[name])}
    given = {"group_size": 4, "epochs": 1} | options
    return METHODS[name](**{key: value for key, value in given.items() if key in fields})


def sparsify(data, method, budget=None, **options):
    given = {"calibration": 4, "options": OPTIONS, "progress": False} | options
    return detr_jax.sparsify(tiny_detector(), data, method, budget, **given)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_makes_a_plan_without_labels(photographs, tmp_path, name):
    method, before = small(name), detr_jax.fingerprint(tiny_detector())
    gates = isinstance(method, TrainedMethod)
    budget = None if method.tuned_by == "nothing" else detr_jax.Threshold(0.4) if gates else detr_jax.Density(0.5)
    sparse = sparsify(photographs, method, budget)
    assert sparse.plan.method == name and sparse.plan.fingerprint == before
    assert list(sparse.plan.selectors) == list(sparse.detector.ffn_specs())
    assert set(sparse.plan.permutations) == set(sparse.plan.selectors)
    density = sparse.plan.measured["calibration"]["density"]
    assert all(0 <= share <= 1 for share in density.values())
    if isinstance(budget, detr_jax.Density) and method.decides in ("group", "neuron") and method.dynamic:
        assert np.mean(list(density.values())) < 0.75
    detr_jax.save_plan(sparse.plan, tmp_path / "plan.safetensors")
    loaded = detr_jax.load_sparse(tiny_detector(), tmp_path / "plan.safetensors")
    image = photographs[0].image
    np.testing.assert_array_equal(loaded.detect(image, 0.0).boxes, sparse.detect(image, 0.0).boxes)


@pytest.mark.parametrize("order", ["own", "coactivation", "kmeans"])
def test_groups_are_made_in_each_order_of_the_neurons(photographs, order):
    options = dataclasses.replace(OPTIONS, neuron_order=order)
    plan = sparsify(photographs, small("static-firing"), detr_jax.Density(0.5), options=options).plan
    assert set(plan.permutations) == (set() if order == "own" else set(tiny_detector().ffns))
    if order == "kmeans":
        for name, ffn in tiny_detector().ffns.items():
            np.testing.assert_array_equal(plan.permutations[name], kmeans_permutation(np.asarray(ffn.w_in[...]), 4))


def test_a_recall_is_met_on_the_calibration_images(photographs):
    sparse = sparsify(photographs, small("mgs", epochs=8), detr_jax.Recall(0.9), calibration=photographs)
    scores = detr_jax.evaluate(sparse, photographs, batch_size=4, group_size=4, progress=False)
    # In each FFN on the inputs of the dense detector; only the first one has these.
    assert 0.9 <= scores.counts["encoder.0"].recall < 1
    assert sparse.plan.training["calibration"] == {"data": "images", "recall": 0.9}


def test_a_threshold_of_gates_is_a_probability(photographs):
    for method, expected in ((small("mgs"), detr_jax.log_odds(0.7)), (small("teal-hidden"), 0.7)):
        selectors = sparsify(photographs, method, detr_jax.Threshold(0.7)).plan.selectors
        np.testing.assert_allclose([selector.threshold for selector in selectors.values()], expected, rtol=1e-6)


@storable
class Size:
    """A gate without a unit."""

    traits = Traits("training", "group", "both")

    of: LinearGate

    def __call__(self, ffn, x, tokens):
        return jax.nn.softplus(self.of(ffn, x, tokens))

    def cost(self, d_model, features):
        return self.of.cost(d_model, features)


@dataclass(frozen=True)
class Sizes(TrainedMethod):
    """A trained method from outside whose scores are no probabilities."""

    name = "sizes"

    def init(self, shape, key):
        return Size(MGS.init(self, shape, key))

    loss = MGS.loss


def test_gates_from_outside_whose_scores_are_no_log_odds_have_thresholds_in_their_own_unit(photographs):
    method = Sizes(group_size=4, epochs=1)
    shared = sparsify(photographs, method, detr_jax.Density(0.5)).plan
    assert "tuning" not in shared.training  # densities are shared out, not trained to
    assert all(0 < selector.threshold < 1 for selector in shared.selectors.values())
    assert np.mean(list(shared.measured["calibration"]["density"].values())) <= 0.5
    own = sparsify(photographs, method, detr_jax.Threshold(1.5)).plan
    assert all(selector.threshold == 1.5 for selector in own.selectors.values())


def test_a_method_whose_scores_are_in_another_unit_than_it_says_is_named(photographs):
    class Undeclared(MGS):
        name = "undeclared"
        unit = None

    with pytest.raises(TypeError, match="the unit of the scores of undeclared is log-odds, not None"):
        sparsify(photographs, Undeclared(group_size=4, epochs=1), detr_jax.Threshold(0.5))


def test_a_divergence_is_not_exceeded(photographs):
    budget = detr_jax.MaxDivergence(0.05)
    sparse = sparsify(photographs, small("wina-hidden"), budget, calibration=photographs)
    scores = detr_jax.evaluate(sparse, photographs, batch_size=4, group_size=4, progress=False)
    assert 0 < scores.divergence <= 0.05 * (1 + 1e-5) and scores.density < 0.9


@pytest.mark.parametrize(
    ("method", "budget", "message"),
    [
        ("sibs", detr_jax.Density(0.1), "takes no budget; its density follows from its options: tau, indicators"),
        ("teal-input", None, "teal-input needs a budget"),
        ("teal-input", detr_jax.Recall(), "input channels, which have no recall"),
        ("static-reconstructed", detr_jax.Threshold(1.0), "has no threshold"),
        ("mgs", 0.5, "mgs needs a budget"),
        ("mgs", detr_jax.Threshold(2.0), "probability from 0 to 1, not 2"),
        ("nonesuch", None, "there is no method 'nonesuch'"),
        (METHODS["mgs"](group_size=5), None, "cannot be divided into groups of 5"),
        (detr_jax.Density(0.1), None, "a method is one of"),
    ],
)
def test_it_refuses_budgets_that_a_method_cannot_meet(photographs, method, budget, message):
    with pytest.raises(InputError, match=message):
        sparsify(photographs, method, budget)


def test_options_are_choices():
    with pytest.raises(InputError, match="neuron_order must be one of coactivation, own, kmeans, not 'best'"):
        detr_jax.FitOptions(neuron_order="best")
    with pytest.raises(InputError, match="loss must be one of divergence, mgs, mgs-contribution, not 'l2'"):
        detr_jax.FitOptions(tuning=GateTuning(loss="l2"))


def test_it_refuses_too_few_images(photographs):
    with pytest.raises(InputError, match="images has 12 images, too few to hold out 12 for calibration"):
        sparsify(photographs, "mgs", calibration=12)


def test_a_folder_is_resumed_or_overwritten_only_when_asked(photographs, tmp_path):
    method, locks = small("mgs"), set(run_folder._LOCKS)
    first = sparsify(photographs, method, folder=tmp_path)
    assert set(run_folder._LOCKS) == locks  # others may have the folder now
    assert (tmp_path / "plan.safetensors").exists()
    with pytest.raises(ExistingFileError, match="finished run"):
        sparsify(photographs, method, folder=tmp_path)
    (tmp_path / "results.json").unlink()
    with pytest.raises(InputError, match="other settings: method"):
        sparsify(photographs, small("mgs", epochs=2), folder=tmp_path, resume=True)
    resumed = sparsify(photographs, method, folder=tmp_path, resume=True)
    for name, selector in first.plan.selectors.items():
        np.testing.assert_array_equal(selector.score.kernel, resumed.plan.selectors[name].score.kernel)
    sparsify(photographs, small("mgs", epochs=2), folder=tmp_path, overwrite=True)


def test_the_command_makes_the_same_plan_byte_for_byte(tmp_path):
    boxes = [annotation(i, i, (4, 4, 20, 20), category_id=1 + i % 2) for i in range(1, 7)]
    for split in ("train2017", "val2017"):
        write_coco(tmp_path, [(32, 40), (40, 32), (32, 64)] * 4, boxes, split)
    detr_jax.save(tiny_detector(), tmp_path / "detector.safetensors")
    data = [detr_jax.open_dataset(f"coco:{tmp_path}", split) for split in ("train", "val")]
    small_run = ["--split.calib", 4, "--split.statistics", 8, "--group-size", 4, "--batch-size", 2, "--epochs", 1]
    model = ["--model", tmp_path / "detector.safetensors", "--coco", tmp_path, "--out", tmp_path / "run"]
    run("train_gates.py", *model, *small_run, "--recall", 0.9)

    options = detr_jax.FitOptions(statistics_images=8, batch_size=2)
    sparse = sparsify(data[0], small("mgs"), detr_jax.Recall(0.9), options=options)
    scores = detr_jax.evaluate(sparse, data[1], batch_size=2, group_size=4, progress=False)
    plan = scores.record(sparse.plan)
    detr_jax.save_plan(plan, tmp_path / "plan.safetensors")
    assert (tmp_path / "plan.safetensors").read_bytes() == (tmp_path / "run/plan.safetensors").read_bytes()


def test_the_command_takes_a_method_that_is_registered_from_outside(tmp_path):
    import toy_method

    assert toy_method.LargestInput is METHODS["largest-input"]
    write_coco(tmp_path, [(32, 40)] * 8, [annotation(1, 1, (4, 4, 20, 20))], "train2017")
    write_coco(tmp_path, [(32, 40)] * 4, [annotation(1, 1, (4, 4, 20, 20))])
    detr_jax.save(tiny_detector(), tmp_path / "detector.safetensors")
    model = ["--model", tmp_path / "detector.safetensors", "--coco", tmp_path, "--out", tmp_path / "run"]
    method = ["--method", "largest-input", "--density", 0.5, "--group-size", 4, "--batch-size", 2]
    run("train_gates.py", *model, *method, "--split.calib", 4)
    plan = detr_jax.load_plan(tmp_path / "run/plan.safetensors", tiny_detector())
    assert plan.method == "largest-input" and plan.training["calibration"]["budget"] == "density 0.5"


def test_contributing_shows_the_toy_method():
    tests = Path(__file__).parent
    shown = (tests.parent / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## A method")[1]
    code = (tests / "toy_method.py").read_text(encoding="utf-8")
    assert code[code.index("@") :].rstrip() == shown.split("```python\n")[1].split("\n```")[0]


def test_an_ffn_that_is_never_active_is_closed_or_named(photographs):
    detector = tiny_detector()
    bias = detector.ffns["decoder.0"].b_in
    bias[...] = bias[...] - 1e4
    options = {"calibration": 4, "options": OPTIONS, "progress": False}
    sparse = detr_jax.sparsify(detector, photographs, small("mgs"), **options)
    assert sparse.plan.selectors["decoder.0"].threshold == np.inf
    assert sparse.plan.measured["calibration"]["density"]["decoder.0"] == 0
    with pytest.raises(InputError, match=r"decoder\.0: no neuron is active"):
        detr_jax.sparsify(detector, photographs, small("sibs"), **options)
