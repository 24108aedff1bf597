"""From a detector to a sparse one in one call: neuron permutation, gates or statistics, budget, plan."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detr_jax.errors import InputError
from detr_jax.methods import METHODS, Method, TokenGates, named
from detr_jax.methods.grouping import group_count
from detr_jax.models import Detector
from detr_jax.models.parameters import fingerprint
from detr_jax.sparse import SparseDETR

if TYPE_CHECKING:
    from detr_jax.data.dataset import Dataset
    from detr_jax.training.budgets import Budget
    from detr_jax.training.fit import Fit, FitOptions


def sparsify(
    detector: Detector,
    data: Dataset,
    method: str | Method = "mgs",
    budget: Budget | None = None,
    *,
    calibration: Dataset | int = 128,
    options: FitOptions | None = None,
    folder: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> SparseDETR:
    """Makes a frozen detector sparse: fits a method on images and gives it thresholds that meet a budget.

    Hidden neurons are permuted so that those of a group are active together, gates are trained or statistics measured,
    and the budget is met on images that nothing was fitted on. Annotations are not needed. The detector stays as it
    is, bit for bit. `scripts/train_gates.py` makes the same plans.

    Args:
        detector: dense.
        data: images to fit on, see `detr_jax.open_dataset`.
        method: one of `detr_jax.methods.METHODS`, by name or with options, such as `methods.MGS(epochs=2)`.
        budget: how much is left out.

            - `Recall(0.99)`, the default: in each FFN the highest threshold that keeps 99 % of the active groups.
            - `Density(0.06)`: 6 % of the groups on average over the FFNs. Gates are trained on to it, all in effect;
              other methods share it among the FFNs by what it changes in the outputs.
            - `MaxDivergence(0.01)`: the lowest density at which the detector's outputs diverge by that much.
            - `Threshold(0.5)`: one for all; of gates a probability, of other methods in the units of their score.
        calibration: images to meet the budget on, or how many from the end of `data` are held out for it.
        options: neuron order, batch size and the like.
        folder: for checkpoints, statistics and `plan.safetensors`; None keeps nothing.
        resume: resume an interrupted run in the folder, which must have had the same arguments.
        overwrite: delete an earlier run in the folder.
        progress: show bars.

    Raises:
        InputError: if there are too few images, there is no such method, it cannot meet such a budget, or its groups
            do not divide the hidden neurons.
        ExistingFileError, MissingFileError: if the folder holds a run that may neither be resumed nor deleted, or none
            to resume.

    >>> import detr_jax
    >>> detector, data = detr_jax.load("detr-tiny"), detr_jax.open_dataset("scenes", "train", 24)
    >>> sparse = detr_jax.sparsify(detector, data, "teal-hidden", detr_jax.Density(0.1), calibration=8, progress=False)
    >>> sparse.plan.method, list(sparse.plan.selectors) == list(detector.ffn_specs())
    ('teal-hidden', True)
    """
    from detr_jax.mesh import is_first_process
    from detr_jax.plan import save_plan
    from detr_jax.run_folder import finish_run, release_run

    with contextlib.ExitStack() as stack:
        where = Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(release_run, where)
        fitted = fit(
            *(detector, data, method, calibration, options, where),
            budgets=[budget],
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
        plan = fitted.plan(budget)
        fitted.check_frozen()
        if folder is not None and is_first_process():
            save_plan(plan, where / "plan.safetensors", overwrite=True)
            finish_run(where, {"training": plan.training, "measured": plan.measured})
    return SparseDETR.of(detector, plan)


def gate_tokens(
    detector: Detector | SparseDETR,
    data: Dataset,
    method: TokenGates | None = None,
    *,
    batch_size: int = 8,
    folder: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> SparseDETR:
    """Chooses the image tokens that the encoder's layers update: trains a score for each on the frozen detector.

    Tokens that are not chosen keep their features, and stay keys and values for the others. Annotations are not needed.
    Works beside what `sparsify` does with the FFNs: give it the sparse detector.

    Args:
        detector: dense, or sparse with a plan that is kept.
        data: images to train on, see `detr_jax.open_dataset`.
        method: `methods.TokenGates` with its options; None for the defaults.
        batch_size: images per step, over all devices.
        folder: for checkpoints and `plan.safetensors`; None keeps nothing.
        resume: resume an interrupted run in the folder, which must have had the same arguments.
        overwrite: delete an earlier run in the folder.
        progress: show a bar.

    Raises:
        InputError: if the detector has no encoder of image tokens, or the shares to keep do not fit its layers.
        ExistingFileError, MissingFileError: as of `sparsify`.

    >>> import detr_jax
    >>> detector, data = detr_jax.load("detr-tiny"), detr_jax.open_dataset("scenes", "train", 16)
    >>> gates = detr_jax.methods.TokenGates(keep=(0.5,), epochs=1)
    >>> sparse = detr_jax.gate_tokens(detector, data, gates, progress=False)
    >>> sparse.plan.selectors["encoder"].keep
    (0.5,)
    """
    from detr_jax.mesh import is_first_process
    from detr_jax.plan import Plan, save_plan
    from detr_jax.run_folder import finish_run, open_run, release_run, versions
    from detr_jax.training.token_gates import fit_token_gates, training_record, untrained_gates

    method = method or TokenGates()
    dense = detector if isinstance(detector, Detector) else detector.dense
    untrained_gates(dense, method)  # before anything is written
    own = fingerprint(dense)
    training = training_record(method, data)
    if isinstance(detector, Detector):
        detector = SparseDETR.of_checked(dense, Plan("token-gates", own, {}, {}, training, {}, versions()))
    with contextlib.ExitStack() as stack:
        where = Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        settings: dict[str, Any] = {
            "method": dataclasses.asdict(method),
            "batch size": batch_size,
            "fingerprint of the detector": own,
            "fingerprint of the data": data.fingerprint,
        }
        open_run(where, settings, ("checkpoints", "plan.safetensors"), resume=resume, overwrite=overwrite)
        stack.callback(release_run, where)
        gates = fit_token_gates(dense, data, method, batch_size, where / "checkpoints", progress=progress)
        sparse = detector.with_tokens(gates)
        plan = dataclasses.replace(sparse.plan, training=sparse.plan.training | training)
        if folder is not None and is_first_process():
            save_plan(plan, where / "plan.safetensors", overwrite=True)
            finish_run(where, {"training": plan.training})
    return dataclasses.replace(sparse, plan=plan)


def fit(
    detector: Detector,
    data: Dataset,
    method: str | Method,
    calibration: Dataset | int,
    options: FitOptions | None,
    folder: Path,
    *,
    budgets: list[Budget | None],
    outputs: Sequence[str] = (),
    more_settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Fit:
    """Checks everything, claims the folder and fits a method, which can be given the `budgets` then; see `sparsify`.

    `outputs` are names of files and folders that the caller writes into the folder later, `more_settings` what they
    depend on.
    """
    from detr_jax.run_folder import open_run
    from detr_jax.training.fit import OUTPUTS, Fit, FitOptions, check_budget, hold_out

    method, options = named(method) if isinstance(method, str) else method, options or FitOptions()
    if not isinstance(method, Method):
        raise InputError(f"a method is one of {', '.join(METHODS)}, or an object of its class, not {method!r}")
    for budget in budgets:
        check_budget(method, budget)
    data, held_out = hold_out(data, calibration)
    for hidden in {spec.hidden for spec in detector.ffn_specs().values()}:
        group_count(hidden, getattr(method, "group_size", 1))
    settings: dict[str, Any] = {
        "method": {"name": method.name} | dataclasses.asdict(method),
        "options": dataclasses.asdict(options),
        "fingerprint of the detector": fingerprint(detector),
        "fingerprint of the data": data.fingerprint,
        "fingerprint of the calibration data": held_out.fingerprint,
    }
    settings |= more_settings or {}
    open_run(folder, settings, (*OUTPUTS, *outputs), resume=resume, overwrite=overwrite)
    return Fit(detector, data, held_out, method, options, folder, progress=progress)
