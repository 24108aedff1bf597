"""Accuracy of a detector, dense or sparse, on a data set: AP with intervals, and the sparse one beside the dense."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from detr_jax.data.classes import with_classes
from detr_jax.data.dataset import Dataset
from detr_jax.data.features import backbone_features
from detr_jax.evaluation.coco_ap import CocoScores, bootstrap, confidence_interval, score, shown
from detr_jax.evaluation.counts import ActivityCounts
from detr_jax.evaluation.runs import measure_selections
from detr_jax.mesh import replicate
from detr_jax.methods import computation_of
from detr_jax.models import Detector, Selectors

if TYPE_CHECKING:
    from detr_jax.kernels import Execution
    from detr_jax.plan import Plan
    from detr_jax.sparse import SparseDETR

Interval = tuple[float, float]

DENSE = "dense"
"""Title of the selection without selectors, which the others are compared with."""
FAR_FROM_CALIBRATION = 1.5
"""Ratio of a plan's density on other images to that on its calibration images from which on a warning is given."""


@dataclass(frozen=True)
class Scores:
    """Accuracy on a data set, and how much of the FFNs was computed for it. Prints as a short table.

    Attributes:
        data: name of the data set.
        images: how many.
        numbers: COCO's twelve numbers by name, None where no object defines one; None without annotations.
        interval: 95 % confidence interval of AP over images.
        category_ap: AP of every category with objects, by name.
        dense_ap: AP of the dense detector on the same images; this and the next two are None without a comparison.
        difference_interval: 95 % confidence interval of the paired difference in AP to the dense detector.
        divergence: mean over images of the divergence of the outputs from those of the dense detector.
        counts: activity of every FFN by name, in the order in which they run.
        executed: by FFN, the share of its hidden neurons that is computed in the end, for all tokens and padding.
        tokens: by FFN, the share of the tokens that go through it, which is below 1 with token gates; counts and shares
            of neurons are of these tokens. None without a comparison.
        coco: what the numbers were made from, for other paired differences; None without annotations.
    """

    data: str
    images: int
    numbers: dict[str, float | None] | None
    interval: Interval | None
    category_ap: dict[str, float]
    dense_ap: float | None
    difference_interval: Interval | None
    divergence: float | None
    counts: dict[str, ActivityCounts]
    executed: dict[str, float]
    tokens: dict[str, float] | None
    coco: CocoScores | None

    @property
    def ap(self) -> float | None:
        """COCO's AP from 0 to 1; None where no object defines it."""
        return None if self.numbers is None else self.numbers["AP"]

    @property
    def difference(self) -> float | None:
        """AP minus that of the dense detector."""
        return None if self.ap is None or self.dense_ap is None else self.ap - self.dense_ap

    @property
    def density(self) -> float:
        """Share of the hidden neurons that the selectors keep, mean over the FFNs."""
        return float(np.mean([counts.density for counts in self.counts.values()]))

    @property
    def executed_density(self) -> float:
        """Share of the hidden neurons that is computed in the end, mean over the FFNs."""
        return float(np.mean(list(self.executed.values())))

    @property
    def group_sparsity(self) -> float:
        """Share of the groups that the selectors leave out, mean over the FFNs."""
        return float(np.mean([counts.group_sparsity for counts in self.counts.values()]))

    def to_json(self) -> dict[str, Any]:
        """The same as JSON; null where something is undefined."""
        columns = ("density", "recall", "precision", "group_sparsity", "neuron_sparsity", "zeros")
        return {
            "data": self.data,
            "images": self.images,
            "numbers": self.numbers,
            "AP_interval": self.interval,
            "category_AP": self.category_ap,
            "dense_AP": self.dense_ap,
            "AP_minus_dense": self.difference,
            "AP_minus_dense_interval": self.difference_interval,
            "divergence": self.divergence,
            "density": self.density,
            "executed_density": self.executed_density,
            "mean_group_sparsity": self.group_sparsity,
            "ffns": {
                name: {column: float(getattr(counts, column)) for column in columns}
                | {"executed": self.executed[name]}
                | ({} if self.tokens is None else {"tokens": self.tokens[name]})
                for name, counts in self.counts.items()
            },
        }

    def record(self, plan: Plan, implementation: str | None = None) -> Plan:
        """The plan with these scores as what was measured with it, on this device and with this implementation.

        None is how the plan's own selectors are computed.
        """
        scores = {key: value for key, value in self.to_json().items() if key != "category_AP"}
        ran = implementation or computation_of(plan.selectors)
        about = {"implementation": ran, "device": jax.devices()[0].device_kind}
        return dataclasses.replace(plan, measured=plan.measured | scores | about)

    def __str__(self) -> str:
        lines = [f"{self.data}, {self.images} images"]
        if self.numbers is None:
            lines.append("AP is undefined: the data has no annotations")
        else:
            rows = [f"{name:<6} {shown(value, '6.3f')}" for name, value in self.numbers.items()]
            if self.interval is not None:
                rows[0] += "  [{:.3f}, {:.3f}]".format(*self.interval)
            if self.difference is not None and self.difference_interval is not None:
                rows[0] += "  minus dense {:+.3f} [{:+.3f}, {:+.3f}]".format(self.difference, *self.difference_interval)
            lines += rows
        if self.divergence is not None:
            lines.append(f"output divergence {self.divergence:.3g}")
            lines.append(f"kept {self.density:.1%} of the hidden neurons, computed {self.executed_density:.1%}")
        if gated := {name: share for name, share in (self.tokens or {}).items() if share < 1}:
            lines.append("tokens updated: " + ", ".join(f"{name} {share:.1%}" for name, share in gated.items()))
        return "\n".join(lines)


def evaluate(
    detector: Detector | SparseDETR,
    data: Dataset,
    *,
    classes: Mapping[str, str] | None = None,
    dense: bool = True,
    batch_size: int = 8,
    implementation: str | Execution | None = None,
    group_size: int = 8,
    exact_shapes: bool = False,
    progress: bool = True,
) -> Scores:
    """Measures a detector on a data set.

    A sparse detector is compared with the dense one on the same images: the difference in AP is paired, and outputs
    are compared even where the data has no annotations.

    Args:
        detector: dense or sparse.
        data: the images, see `detr_jax.open_dataset`.
        classes: the detector's name for the data's name of a category, where they differ; other categories are matched
            by name, see `detr_jax.data.classes.with_classes`.
        dense: compare a sparse detector with the dense one; without, the dense one is not computed.
        batch_size: images per batch, over all devices.
        implementation: of a sparse detector, see `SparseDETR.with_implementation`; None is what its plan says.
        group_size: hidden neurons per group, for the counts of groups.
        exact_shapes: compute images at their own sizes instead of padding them to a few; compiles for every size, and
            on one device only.
        progress: show a bar.

    Raises:
        InputError: if an image cannot be read, a score is not finite, the group size does not divide the hidden
            neurons, the implementation is unknown or cannot compute what the plan keeps, the detector knows none of the
            data's categories, or a name in `classes` does not exist.

    >>> import detr_jax
    >>> data = detr_jax.open_dataset("scenes", "val", 4)
    >>> scores = detr_jax.evaluate(detr_jax.load_sparse("detr-tiny"), data, progress=False)
    >>> abs(scores.difference) < 0.02, scores.density < 0.2
    (True, True)
    """
    selections: dict[str, Selectors] = {DENSE: {}}
    measured: Mapping[str, Any] = {}
    if isinstance(detector, Detector):
        model = detector
    else:
        measured = detector.plan.measured
        if implementation is not None:
            detector = detector.with_implementation(implementation)
        model = detector.detector
        selections = (selections if dense else {}) | {"sparse": detector.plan.selectors}
    data, _ = with_classes(data, model.labels, classes)
    found = evaluate_selections(
        model, data, selections, batch_size, group_size=group_size, exact_shapes=exact_shapes, progress=progress
    )
    scores = list(found.values())[-1]
    warn_if_far_from_calibration(measured, scores.density, scores.data)
    return scores


def evaluate_selections(
    model: Detector,
    data: Dataset,
    selections: Mapping[str, Selectors],
    batch_size: int,
    *,
    group_size: int,
    exact_shapes: bool = False,
    progress: bool = True,
) -> dict[str, Scores]:
    """Measures several selections of what one detector computes, in one pass over a data set.

    The detector has its hidden neurons in the order of the selectors. All selections are compared with the one that has
    the title "dense", if there is one. Other arguments as of `evaluate`.
    """
    data, _ = with_classes(data, model.labels)
    placed = model if exact_shapes else replicate(model)  # images of their own size have no batch to share
    selections = dict(sorted(selections.items(), key=lambda item: item[0] != DENSE))
    features = backbone_features(placed, data, batch_size, "evaluating" if progress else None, exact=exact_shapes)
    measured = measure_selections(placed, features, selections, group_size=group_size)
    ground_truth = data.ground_truth() if data.has_annotations else None
    found: dict[str, Scores] = {}
    dense_samples = None  # AP of the dense detector on drawn images
    for title, one in measured.items():
        coco = numbers = samples = None
        if ground_truth is not None:
            coco = score(ground_truth, one.results, data.image_ids())
            numbers = {name: None if np.isnan(value) else value for name, value in coco.numbers.items()}
            samples = None if numbers["AP"] is None else bootstrap(coco)
        difference = None
        if samples is not None and dense_samples is not None:
            difference = confidence_interval(samples - dense_samples)
        found[title] = Scores(
            data=data.name,
            images=len(data),
            numbers=numbers,
            interval=None if samples is None else confidence_interval(samples),
            category_ap={} if coco is None else coco.category_ap,
            dense_ap=found[DENSE].ap if DENSE in found else None,
            difference_interval=difference,
            divergence=one.divergence if DENSE in found else None,
            counts=one.counts,
            executed=one.executed,
            tokens=_token_shares(one.counts, found[DENSE].counts) if DENSE in found else None,
            coco=coco,
        )
        if title == DENSE:
            dense_samples = samples
    return found


def _token_shares(counts: Mapping[str, ActivityCounts], dense: Mapping[str, ActivityCounts]) -> dict[str, float]:
    return {name: of_ffn.neurons / dense[name].neurons for name, of_ffn in counts.items()}


def warn_if_far_from_calibration(
    measured: Mapping[str, Any], density: float, data: str, tolerance: float = FAR_FROM_CALIBRATION
) -> None:
    """Warns where a plan keeps much more or less on other images, called `data`, than on those it was made with.

    `tolerance` is the ratio of the densities from which on a warning is given. Says nothing where the plan does not
    know its mean density over the FFNs.
    """
    if "calibration" in measured:
        expected = float(np.mean(list(measured["calibration"]["density"].values())))
    elif "density" in measured:
        expected = float(measured["density"])
    elif "mean_group_sparsity" in measured:
        expected = 1 - float(measured["mean_group_sparsity"])
    else:
        return
    if not expected:
        return
    ratio = max(density, 1e-9) / expected
    if not 1 / tolerance <= ratio <= tolerance:
        warnings.warn(
            f"the plan keeps {density:.1%} of the hidden neurons on {data}, for {expected:.1%} on the "
            "images it was made with: these images are unlike them, and accuracy and speed may be too; make a plan "
            "with images like these",
            stacklevel=3,
        )
