"""What studies share: data splits, cached backbone features, gate training, scores against dense, rows that survive an
interruption, and tables."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

import detr_jax
from detr_jax.commands.options import DataOptions
from detr_jax.data.batches import CachedBatches
from detr_jax.data.dataset import Dataset
from detr_jax.data.features import BackboneFeatures, backbone_features
from detr_jax.errors import InputError
from detr_jax.evaluation.coco_ap import bootstrap, confidence_interval, score
from detr_jax.evaluation.runs import measure_dataset
from detr_jax.files import write_json
from detr_jax.methods import Thresholded, TrainedMethod
from detr_jax.models import DETR, Selector, Selectors
from detr_jax.models.base import HasFFNs
from detr_jax.training.fit import hold_out
from detr_jax.training.gates import Gates, train_gates


@dataclass(frozen=True)
class Splits:
    """Images to train on, held-out training images to calibrate on, and validation images."""

    training: Dataset
    calibration: Dataset
    validation: Dataset

    @property
    def fingerprints(self) -> dict[str, str]:
        """By use; the same wherever the data are."""
        return {use: getattr(self, use).fingerprint for use in ("training", "calibration", "validation")}

    @property
    def names(self) -> dict[str, str]:
        return {use: dataset.name for use, dataset in vars(self).items()}


def open_splits(data: DataOptions, model: DETR, train: int | None, calibration: int, validation: int) -> Splits:
    """Opens the data of a study, its categories matched to the detector's classes.

    Args:
        data: of the command.
        model: the detector.
        train: images to train on; None takes all that are not held out.
        calibration: training images to hold out, after those to train on.
        validation: validation images.

    Raises:
        InputError: if no images are left to train on.
    """
    opened = data.open("train", None if train is None else train + calibration), data.open("val", validation)
    dataset, evaluated = data.matched(model.labels, *opened)
    return Splits(*hold_out(dataset, calibration), evaluated)


def embed(model: DETR, dataset: Dataset, batch_size: int, use: str) -> list[BackboneFeatures]:
    """Backbone features of a data set, in memory."""
    return list(backbone_features(model, dataset, batch_size, f"embedding {use} images"))


def cached(features: Sequence[BackboneFeatures], shuffle_seed: int | None = None) -> CachedBatches:
    """Batches of backbone features for passes over the transformer."""
    return CachedBatches([batch.tokens for batch in features], shuffle_seed)


def train(
    model: HasFFNs,
    batches: CachedBatches,
    methods: Sequence[TrainedMethod],
    folder: Path,
    active_selectors: Mapping[str, Mapping[str, Thresholded]] | None = None,
) -> dict[str, Gates]:
    """Gates of some methods by their names, with a progress bar; arguments as in `train_gates`."""
    named = {method.name: method for method in methods}
    total = methods[0].epochs * len(batches)
    with tqdm(total=total, desc=f"training {', '.join(named)}", unit="step") as bar:

        def report(step: int, loss: jax.Array) -> None:
            bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
            bar.update(step - bar.n)

        return train_gates(model, batches, named, folder, report, active_selectors=active_selectors)


class Rows:
    """Results by key, kept in a file so that a resumed run measures only what is missing."""

    def __init__(self, path: Path):
        self._path = path
        self.by_key: dict[str, dict] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def __contains__(self, key: str) -> bool:
        return key in self.by_key

    def keep(self, key: str, row: dict) -> None:
        self.by_key[key] = row
        write_json(self._path, self.by_key)


class Scorer:
    """AP of a detector with sparse FFNs, and its paired difference to the dense one, on cached features.

    Args:
        dense: the detector.
        dataset: of the images.
        features: of the images.
        group_size: neurons per group, for the counts.
    """

    def __init__(self, dense: DETR, dataset: Dataset, features: Sequence[BackboneFeatures], group_size: int):
        self._dataset, self._features, self._group_size = dataset, features, group_size
        self._ground_truth = dataset.ground_truth()
        scores, _ = self._score(dense, {})
        self.dense_AP, self._samples = scores.numbers["AP"], bootstrap(scores)

    def _score(self, model: DETR, selectors: Selectors):
        measured = measure_dataset(model, self._features, selectors=dict(selectors), group_size=self._group_size)
        return score(self._ground_truth, measured.results, self._dataset.image_ids()), measured.counts

    def __call__(self, model: DETR, selectors: Selectors) -> dict:
        """`AP`, `AP_minus_dense` and its interval, and `density`, the mean over the FFNs."""
        scores, counts = self._score(model, selectors)
        return {
            "AP": scores.numbers["AP"],
            "AP_minus_dense": scores.numbers["AP"] - self.dense_AP,
            "AP_minus_dense_interval": confidence_interval(bootstrap(scores) - self._samples),
            "density": float(np.mean([of_ffn.density for of_ffn in counts.values()])),
        }


def describe(selector: Selector) -> dict:
    """What a selector needs, decides and saves, for a row of the comparison."""
    traits = selector.traits
    return {
        "needs": traits.needs,
        "granularity": traits.granularity,
        "saves": traits.saves,
        "dynamic": traits.dynamic,
        "trained": traits.needs == "training",
    }


def one_at_a_time(selectors: Selectors) -> dict[str, dict[str, Selector]]:
    """Which FFN costs the accuracy: each alone, then from the first to each, by title."""
    alone = {f"{name} alone": {name: selector} for name, selector in selectors.items()}
    names = list(selectors)
    up_to = {f"up to {name}": {n: selectors[n] for n in names[: i + 1]} for i, name in enumerate(names)}
    return alone | up_to


@contextlib.contextmanager
def frozen(model: DETR) -> Iterator[str]:
    """Gives the detector's fingerprint, and checks at the end that it is still the same."""
    before = detr_jax.fingerprint(model)
    yield before
    if detr_jax.fingerprint(model) != before:
        raise AssertionError("the frozen detector changed")


def check_options(arguments: object, *, shares: Sequence[str] = (), least: Mapping[str, int] | None = None) -> None:
    """Refuses options, of one value or several, that are empty or out of bounds.

    Args:
        arguments: of a command.
        shares: names of options above 0 and at most 1.
        least: smallest values by name of the option.

    Raises:
        InputError: with the option and the value.
    """
    bounds = {name: (lambda value: 0 < value <= 1, "above 0 and at most 1") for name in shares}
    for name, smallest in (least or {}).items():
        bounds[name] = (lambda value, smallest=smallest: value >= smallest, f"at least {smallest}")
    for name, (fits, text) in bounds.items():
        option, given = f"--{name.replace('_', '-')}", getattr(arguments, name)
        values = given if isinstance(given, tuple) else (given,)
        if not values:
            raise InputError(f"{option} needs at least one value")
        if wrong := [value for value in values if not fits(value)]:
            raise InputError(f"{option} must be {text}, not {wrong[0]:g}")


def check_rows(given: Sequence[str], known: Iterable[str]) -> None:
    """Raises an InputError if `--rows` are none, or some of them unknown."""
    known = list(known)
    unknown = [row for row in given if row not in known]
    if unknown or not given:
        raise InputError(f"--rows are some of {', '.join(known)}, not {unknown}")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table whose source lines up; the first `left` columns are aligned to the left."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (w + 2)) if i < left else ("-" * (w + 1) + ":") for i, w in enumerate(widths)]
    return "\n".join([line(header), f"|{'|'.join(rule)}|", *map(line, rows)])
