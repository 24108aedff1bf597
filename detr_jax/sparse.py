"""A frozen detector with a plan: called like the dense one, looked into, changed without loading anything again."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.data.image_list import ImageLike
from detr_jax.detection import detect
from detr_jax.errors import InputError
from detr_jax.evaluation.inspection import FFNActivity, FFNExecution, activity, execution_report
from detr_jax.kernels import IMPLEMENTATIONS, Execution
from detr_jax.methods import Executed, Thresholded, at_threshold, computation_of, executed, prepared
from detr_jax.methods.token_gates import GatedTokens
from detr_jax.models import Detector, Outputs, Preprocessing, Selector, Selectors
from detr_jax.models.detections import Detections, ImageDetections
from detr_jax.models.parameters import fingerprint
from detr_jax.plan import Plan, load_plan
from detr_jax.plan.checks import check_plan
from detr_jax.plan.plan import same_permutations
from detr_jax.pytrees import pytree


@pytree
class SparseDETR:
    """A frozen detector whose FFNs compute what a plan says. `detr_jax.load_sparse` makes one.

    It is called like the dense detector and is a pytree like it. To differentiate by parameters and not by the plan's
    numbers, take the gradient of `lambda detector: loss(dataclasses.replace(model, detector=detector))`. Methods whose
    names begin with `with` give another one that shares the detector's parameters."""

    detector: Detector
    """The frozen detector, its hidden neurons in the plan's orders."""
    plan: Plan
    """What makes it sparse."""

    @classmethod
    def of(cls, model: Detector, plan: Plan) -> "SparseDETR":
        """A detector in its own order, with a plan; an InputError if the plan is for another one or does not fit."""
        check_plan(plan, model, fingerprint(model), "the plan")
        return cls.of_checked(model, plan)

    @classmethod
    def of_checked(cls, model: Detector, plan: Plan) -> "SparseDETR":
        """The same with a plan that was checked, such as one that `load_plan` read for this detector."""
        permuted = model.with_permutations(plan.permutations)
        return cls(permuted, _prepared(plan, permuted))

    def __repr__(self) -> str:
        plan, name, ffns = self.plan, type(self.detector).__name__, self.detector.ffn_specs()
        sparse = len(self._ffn_selectors)
        lines = (
            f"detector: {name} of {len(ffns)} FFNs and {len(self.labels)} labels, {jnp.dtype(self.dtype)}",
            f"plan: {plan.method}, {sparse} FFNs sparse, {len(plan.permutations)} with permuted neurons",
            f"execution: {computation_of(plan.selectors)}",
            f"measured: {', '.join(plan.measured) or 'nothing'}",
        )
        return "\n  ".join(("SparseDETR(", *lines)) + "\n)"

    @property
    def config(self) -> Any:
        """Of the detector."""
        return self.detector.config

    @property
    def preprocessing(self) -> Preprocessing:
        """Of the detector's images."""
        return self.detector.preprocessing

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the detector's classes."""
        return self.detector.labels

    @property
    def dtype(self) -> jnp.dtype:
        """Of the computation."""
        return self.detector.dtype

    @property
    def dense(self) -> Detector:
        """The frozen detector as it was loaded, its neurons in their own order."""
        inverse = {name: np.argsort(permutation) for name, permutation in self.plan.permutations.items()}
        return self.detector.with_permutations(inverse)

    def __call__(
        self,
        pixel_values: jax.Array,
        pixel_mask: jax.Array | None = None,
        *,
        selectors: Selectors | None = None,
        **options: Any,
    ) -> Any:
        """Outputs and options as of the dense detector, but `selectors` None are the plan's, and {} is dense."""
        selectors = self.plan.selectors if selectors is None else selectors
        return self.detector(pixel_values, pixel_mask, selectors=selectors, **options)

    def embed(self, pixel_values: jax.Array, pixel_mask: jax.Array, valid: jax.Array) -> Any:
        """The part before the transformer, see `Detector.embed`."""
        return self.detector.embed(pixel_values, pixel_mask, valid)

    def transform(self, features: Any, *, selectors: Selectors | None = None, **options: Any) -> Outputs:
        """The transformer and the heads; arguments and errors as of a call."""
        selectors = self.plan.selectors if selectors is None else selectors
        return self.detector.transform(features, selectors=selectors, **options)

    def detections(self, outputs: Any, sizes: jax.Array) -> Detections:
        """Detections in pixels, see `Detector.detections`."""
        return self.detector.detections(outputs, sizes)

    def detect(
        self, images: ImageLike | Sequence[ImageLike], threshold: float = 0.7, *, batch_size: int = 1
    ) -> ImageDetections | list[ImageDetections]:
        """Detects objects in files, PIL images or arrays; see `detr_jax.detect`."""
        return detect(self, images, threshold, batch_size=batch_size)

    def inspect(self, pixel_values: jax.Array, pixel_mask: jax.Array | None = None) -> dict[str, FFNActivity]:
        """Hidden activations, gate maps and densities of each FFN by name, in the order in which they run.

        Args:
            pixel_values: (batch, height, width, 3) float, see `detr_jax.preprocess_images`.
            pixel_mask: (batch, height, width) bool; None where nothing is padding.

        >>> import detr_jax
        >>> from detr_jax.data.scenes import ScenesDataset
        >>> model = detr_jax.load_sparse("detr-tiny")
        >>> layers = model.inspect(*detr_jax.preprocess_images(ScenesDataset("val", 1)[0].image, model.preprocessing))
        >>> list(layers)
        ['encoder.0', 'encoder.1', 'encoder.2', 'decoder.0', 'decoder.1', 'decoder.2']
        >>> layers["encoder.0"].hidden.shape, layers["encoder.0"].grids
        ((1, 64, 1024), ((8, 8),))
        >>> bool(layers["encoder.0"].firing < layers["encoder.0"].density < 0.3)
        True
        """
        found = _inspect(self.detector, self.plan.selectors, pixel_values, pixel_mask)
        return {name: found[name] for name in self.detector.ffn_specs()}

    def execution_report(self, image_size: tuple[int, int], batch_size: int = 1) -> dict[str, FFNExecution]:
        """How each FFN is computed on this device, without computing it: what runs, and why nothing faster does.

        `image_size` is (height, width) in pixels.

        >>> import detr_jax
        >>> model = detr_jax.load_sparse("detr-tiny").with_implementation("xla")
        >>> print(model.execution_report((128, 128))["encoder.0"])
        xla, images, blocks of 8 neurons
        """
        return execution_report(self.detector, self.plan.selectors, image_size, batch_size)

    def draw_activity(self, image: ImageLike, path: Path | str, threshold: float = 0.7) -> None:
        """Writes a PNG of where on an image neurons are active, which the plan keeps, and detections from a score."""
        from detr_jax.viz.activity_map import plot_activity  # imports matplotlib
        from detr_jax.viz.figures import save_figure

        save_figure(plot_activity(self, image, threshold), Path(path))

    def with_plan(self, plan: Plan | Path | str) -> "SparseDETR":
        """The same detector with another plan, an object or what `detr_jax.load_plan` takes; raises as that does."""
        if not isinstance(plan, Plan):
            plan = load_plan(plan, self.dense)
        if not same_permutations(plan.permutations, self.plan.permutations):
            return SparseDETR.of(self.dense, plan)
        check_plan(plan, self.detector, self.plan.fingerprint, "the plan")
        return SparseDETR(self.detector, _prepared(plan, self.detector))

    def with_threshold(
        self,
        probability: float | Mapping[str, float] | None = None,
        *,
        score: float | Mapping[str, float] | None = None,
    ) -> "SparseDETR":
        """The same with other thresholds for all FFNs, or by name for some; `plan.measured` is emptied.

        Args:
            probability: threshold of gates: groups are computed that are active with at least this probability.
            score: instead, threshold in the unit of the method's own score; log-odds for gates.

        Raises:
            InputError: if both or none are given, an FFN has no selector or its selector no threshold, its score is no
                probability, or a threshold is NaN.

        >>> import detr_jax
        >>> model = detr_jax.load_sparse("detr-tiny").with_threshold(0.5)
        >>> model = model.with_threshold({"decoder.2": 0.25})
        >>> [round(float(s.threshold), 3) for s in model.plan.selectors.values()]  # log-odds
        [0.0, 0.0, -1.099, 0.0, 0.0, 0.0]
        """
        if (probability is None) == (score is None):
            raise InputError("with_threshold takes a probability, or score= in the unit of the method's own score")
        selectors = dict(self.plan.selectors)
        given = score if probability is None else probability
        gated = self._ffn_selectors
        for name, value in (given if isinstance(given, Mapping) else dict.fromkeys(gated, given)).items():
            if name not in gated:
                raise InputError(f"{name!r} is not gated; the plan has selectors for {', '.join(gated)}")

            def change(found: Thresholded, value: Any = value) -> Thresholded:
                return found.at(value) if probability is None else found.at_probability(value)

            selectors[name] = at_threshold(selectors[name], change)
        return SparseDETR(self.detector, dataclasses.replace(self.plan, selectors=selectors, measured={}))

    def with_tokens(self, tokens: GatedTokens | None) -> "SparseDETR":
        """The same with image tokens that the encoder's layers update chosen by `tokens`, None for all of them.

        `detr_jax.gate_tokens` makes such a selector, of which `tokens.keeping(0.2)` keeps another share;
        `plan.measured` is emptied.

        Raises:
            InputError: if the detector has no encoder of image tokens, or the selector does not fit it.
        """
        if not self.detector.token_parts:
            raise InputError(f"a {type(self.detector).__name__} has no encoder whose tokens could be chosen")
        selectors: dict[str, Any] = self._ffn_selectors
        selectors |= {} if tokens is None else dict.fromkeys(self.detector.token_parts, tokens)
        return self.with_plan(dataclasses.replace(self.plan, selectors=selectors, measured={}))

    def with_implementation(self, implementation: str | Execution) -> "SparseDETR":
        """The same, computed in another way; unless that is the plan's own, `plan.measured` is emptied.

        Args:
            implementation: "masked" computes everything and ignores what is not kept; "auto" leaves out what no token
                of an image needs, by the fastest implementation for this device; or one of
                `detr_jax.kernels.IMPLEMENTATIONS`, or an `Execution`, which also has the sizes of tiles and blocks.

        Raises:
            ValueError: if there is none of that name, or it cannot compute what the selectors keep.

        >>> import detr_jax
        >>> model = detr_jax.load_sparse("detr-tiny").with_implementation("auto")
        >>> model.plan.selectors["encoder.0"].execution
        Execution(tile_size=None, block_size=None, exact=False, ordered=False, implementation=None)
        """
        named = {name: Execution(implementation=name) for name in IMPLEMENTATIONS}
        ways = {"masked": None, "auto": Execution()} | named
        if isinstance(implementation, str) and implementation not in ways:
            known = ", ".join(ways)
            raise InputError(f"there is no implementation {implementation!r} of the sparse FFN; there are {known}")
        execution = ways[implementation] if isinstance(implementation, str) else implementation
        if all(own == execution for own in self._executions):
            return self
        selectors = executed(self.plan.selectors, execution)
        return self.with_plan(dataclasses.replace(self.plan, selectors=selectors, measured={}))

    @property
    def _executions(self) -> list[Execution | None]:
        """Of each FFN; None for the masked reference."""
        return [s.execution if isinstance(s, Executed) else None for s in self._ffn_selectors.values()]

    @property
    def _ffn_selectors(self) -> dict[str, Selector]:
        """The plan's selectors without that of tokens."""
        return {name: s for name, s in self.plan.selectors.items() if name not in self.detector.token_parts}


def _prepared(plan: Plan, permuted: Detector) -> Plan:
    """The plan with what its selectors read of the detector gathered."""
    weights = permuted.ffn_weights()
    selectors = {
        name: prepared(selector, weights[name]) if name in weights else selector
        for name, selector in plan.selectors.items()
    }
    return dataclasses.replace(plan, selectors=selectors)


@jax.jit
def _inspect(
    detector: Detector, selectors: Selectors, pixel_values: jax.Array, pixel_mask: jax.Array | None
) -> dict[str, FFNActivity]:
    traces = detector(pixel_values, pixel_mask, selectors=selectors, trace=True).traces
    grids, specs = detector.token_grids(pixel_values.shape[1:3]), detector.ffn_specs()
    return {name: activity(trace, tuple(grids[i] for i in specs[name].grids)) for name, trace in traces.items()}
