"""Fine-tuning: the recipe, its steps however they are computed, kills, and the command."""

import dataclasses
import json
import re
import time

import jax.numpy as jnp
import numpy as np
import pytest
from commands import SCRIPTS, refusal, run
from fine_tuning import write_inputs
from processes import finish, kill_after_checkpoint, start, start_two

import detr_jax
from detr_jax.data.augment import AugmentedBatches
from detr_jax.data.classes import with_classes
from detr_jax.data.coco import CocoDataset
from detr_jax.models.parameters import named_parameters
from detr_jax.training.detector.finetune import FineTuning, fine_tune, optimiser, take_step

TRAINING = FineTuning(epochs=2, batch_size=8, learning_rate=1e-3, gradient_norm=1.0, checkpoint_steps=1)
OPTIONS = ("--batch-size", 8, "--learning-rate", 0.003, "--backbone-learning-rate", 0.001, "--gradient-norm", 1)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def model(inputs):
    with pytest.warns(UserWarning, match="keeps no object, dog and is new, to be trained, for fox"):
        return detr_jax.load(inputs / "detector.safetensors", labels=["dog", "fox"])


def arrays(model):
    return {name: np.asarray(array) for name, array in named_parameters(model).items()}


@pytest.fixture(scope="module")
def tune(inputs, model):
    """Fine-tunes the detector; returns it and the loss of every step."""
    data, _ = with_classes(CocoDataset(inputs, "train2017"), model.labels)

    def tune(folder, on_step=lambda step: None, is_enough=lambda epoch, model: False, model=model, **changes):
        training, losses = dataclasses.replace(TRAINING, **changes), {}

        def report(step, loss):
            if loss is not None:
                losses[step] = float(loss)
                on_step(step)

        batches = AugmentedBatches(model, data, training.batch_size, training.seed)
        return fine_tune(model, batches, training, folder, report, is_enough), losses

    return tune


@pytest.fixture(scope="module")
def whole(tune, tmp_path_factory):
    return tune(tmp_path_factory.mktemp("whole"))


def test_the_loss_falls_and_what_is_frozen_stays(tune, model, tmp_path):
    compiled = take_step._cache_size()
    rates = {"learning_rate": 3e-3, "backbone_learning_rate": 1e-3, "gradient_norm": 0.1}
    tuned, losses = tune(tmp_path, epochs=150, lr_drop=150, checkpoint_steps=1000, **rates)
    assert take_step._cache_size() == compiled + 1, "all steps are one program"
    losses = list(losses.values())
    # Sums in another order lead 300 steps elsewhere: by how much it falls differs from one JAX to another.
    assert len(losses) == 300 and np.mean(losses[-50:]) < 0.85 * np.mean(losses[:10])
    before, after = arrays(model), arrays(tuned)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    frozen = {name for name in before if name.startswith("backbone") and ("norm" in name or "stages.1" not in name)}
    assert frozen and changed == set(before) - frozen


def test_a_killed_training_goes_on_bit_identically(tune, whole, tmp_path):
    tuned, losses = whole
    epochs = []

    def kill(step):
        if step == 3:
            for _ in range(600):  # checkpoints are written in the background
                if (tmp_path / "2").exists():
                    raise Killed
                time.sleep(0.1)

    with pytest.raises(Killed):
        tune(tmp_path, kill)
    resumed, rest = tune(tmp_path, is_enough=lambda epoch, model: epochs.append(epoch))
    assert epochs[-1] == 2 and set(rest) <= {3, 4} and rest[4] == losses[4]
    for name, array in arrays(tuned).items():
        np.testing.assert_array_equal(array, arrays(resumed)[name], err_msg=name)


def test_training_ends_early_and_a_finished_one_is_not_repeated(tune, tmp_path):
    epochs = []

    def is_enough(epoch, model):
        epochs.append((epoch, detr_jax.fingerprint(model)))
        return epoch == 2

    tuned, losses = tune(tmp_path, is_enough=is_enough, epochs=5)
    assert list(losses) == [1, 2, 3, 4] and [epoch for epoch, _ in epochs] == [1, 2]
    assert epochs[-1][1] == detr_jax.fingerprint(tuned)
    again, losses = tune(tmp_path, is_enough=is_enough, epochs=5)
    assert not losses and detr_jax.fingerprint(again) == detr_jax.fingerprint(tuned)


@pytest.mark.parametrize("changes", [{"remat": True}, {"accumulation": 4}])
def test_options_for_memory_change_no_step(tune, whole, tmp_path, changes):
    _, losses = tune(tmp_path, **changes)
    np.testing.assert_allclose(list(losses.values()), list(whole[1].values()), rtol=2e-4)


def test_parameters_stay_float32_in_bfloat16(tune, whole, inputs, tmp_path):
    with pytest.warns(UserWarning, match="class head"):
        model = detr_jax.load(inputs / "detector.safetensors", dtype=jnp.bfloat16, labels=["dog", "fox"])
    tuned, losses = tune(tmp_path, model=model, epochs=1)
    assert {array.dtype for array in arrays(tuned).values()} == {np.dtype("float32")}
    np.testing.assert_allclose(losses[1], whole[1][1], rtol=0.1)


def test_the_optimiser_is_the_official_one():
    """torch's AdamW, clipping and StepLR, as the official `main.py` and `engine.py` use them."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    values = {"backbone": rng.standard_normal((3, 4)), "rest": rng.standard_normal(5)}
    values = {name: value.astype(np.float32) for name, value in values.items()}
    official = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in values.items()}
    groups = [{"params": [official["rest"]]}, {"params": [official["backbone"]], "lr": 1e-5}]
    adamw = torch.optim.AdamW(groups, lr=1e-4, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.StepLR(adamw, 2)
    ours = optimiser(FineTuning(lr_drop=2), epoch_steps=3)
    memory = ours.init(values)
    for step in range(9):
        gradients = {name: rng.standard_normal(value.shape).astype(np.float32) for name, value in values.items()}
        for name, parameter in official.items():
            parameter.grad = torch.tensor(gradients[name])
        torch.nn.utils.clip_grad_norm_(official.values(), 0.1)
        adamw.step()
        if step in (2, 5):  # the ends of the first two epochs of three steps
            schedule.step()
        updates, memory = ours.update(gradients, memory, values)
        values = {name: value + updates[name] for name, value in values.items()}
        for name, parameter in official.items():
            np.testing.assert_allclose(values[name], parameter.detach().numpy(), rtol=0, atol=2e-7, err_msg=str(step))


def arguments(inputs, out, *options):
    return ("--model", inputs / "detector.safetensors", "--data", f"coco:{inputs}", *OPTIONS, "--out", out, *options)


def test_the_command_keeps_the_best_detector_and_says_what_it_gained(inputs, tmp_path, capsys):
    out = tmp_path / "out"
    run("train_detector.py", *arguments(inputs, out, "--epochs", 3, "--patience", 1))
    printed = capsys.readouterr()
    assert "keeps no object, dog and is new, to be trained, for fox" in printed.err
    results = json.loads((out / "results.json").read_text())
    epochs = results["validation"]["epochs"]
    best = max(epochs, key=lambda entry: (entry["AP"], entry["epoch"]))
    assert results["best_epoch"] == best["epoch"]
    assert results["after"]["numbers"]["AP"] == pytest.approx(best["AP"], abs=1e-6)
    assert f"AP after  {best['AP']:.3f}" in printed.out and "AP before" in printed.out
    tuned = detr_jax.load(out / "detector.safetensors")
    assert tuned.labels == ("dog", "fox") and results["labels"] == ["dog", "fox"]
    assert results["fingerprint"] == detr_jax.fingerprint(tuned)
    assert (out / "training.png").stat().st_size > 0
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == [2 * entry["epoch"] for entry in epochs]
    assert "holds a finished run" in refusal(capsys, "train_detector.py", *arguments(inputs, out, "--epochs", 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--accumulation", 3), "a batch of 8 images on 1 device cannot be computed in 3 parts; .* a multiple of 3"),
        (("--batch-size", 17), "train2017 has 16 images, too few for a batch of 17"),
        (("--labels", "dog", "Dog"), "labels must differ whatever their case, but there are dog, Dog"),
        (("--labels", "wolf"), "the detector knows none of the data's categories: they are dog, fox"),
        (("--data", "scenes"), "fine-tuning needs images: --data coco:PATH, or --split.train"),
        (("--data", "images:{inputs}/train2017"), "has no annotated objects in train2017-train, which"),
    ],
)
def test_bad_inputs_are_refused_before_the_folder_is_claimed(inputs, tmp_path, capsys, options, message):
    options = [str(option).format(inputs=inputs) for option in options]
    assert re.search(message, refusal(capsys, "train_detector.py", *arguments(inputs, tmp_path / "out", *options)))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_many_devices_and_two_processes_of_which_one_was_killed_give_what_one_gives(inputs, tmp_path):
    def command(out, *options):
        return [
            SCRIPTS / "train_detector.py",
            *arguments(inputs, out, "--epochs", 8, "--checkpoint-steps", 4, *options),
        ]

    exact = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    one, eight, two = (tmp_path / name for name in ("one", "eight", "two"))
    processes = {out: start(command(out), out, devices, **exact) for out, devices in ((one, 1), (eight, 8))}
    for out, process in processes.items():
        finish(out, process)
    kept = kill_after_checkpoint(start_two(command(two), two, **exact), two / "checkpoints")
    assert 4 <= kept < 16 and not (two / "results.json").exists()
    finish(two, *start_two(command(two, "--resume"), two, **exact))

    def losses(out):
        return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]

    results = {out: json.loads((out / "results.json").read_text()) for out in (one, eight, two)}
    assert [results[out]["devices"] for out in results] == [1, 8, 8]
    assert results[one]["before"]["numbers"] == pytest.approx(results[eight]["before"]["numbers"], abs=1e-4)
    for out in (eight, two):
        np.testing.assert_allclose(losses(out), losses(one), rtol=1e-3)
        assert results[out]["best_epoch"] == results[one]["best_epoch"]
