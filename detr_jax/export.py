"""Detectors as graphs that run without this library: StableHLO for JAX, ONNX for onnxruntime; see docs/serving.md."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export as jax_export

from detr_jax.data.transforms import normalise
from detr_jax.errors import ExistingFileError, InputError
from detr_jax.files import refuse_existing, replacing, write_json
from detr_jax.kernels import Execution, expand_groups
from detr_jax.methods import Executed, RoutedExperts
from detr_jax.models import Detector, FFNWeights, Selector
from detr_jax.models.ffn import FFN
from detr_jax.models.parameters import fingerprint
from detr_jax.sparse import SparseDETR

FORMATS = ("stablehlo", "onnx")
PLATFORMS = ("cpu", "cuda", "tpu")
PORTABLE = ("xla", "reference")
"""Implementations of the sparse FFN that are the same program on every platform; the others are Pallas kernels."""


def export(
    model: Detector | SparseDETR,
    path: Path | str,
    *,
    size: tuple[int, int],
    batch: int | None = None,
    format: str | None = None,
    platforms: Sequence[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a detector as a graph from 8-bit pixels to detections, and a description beside it as `<path>.json`.

    The graph has preprocessing but for resizing, and post-processing. Of `batch` images:

    - `pixels` (batch, height, width, 3) uint8 RGB, each image resized into the top left corner;
    - `sizes` (batch, 2) int32, height and width of the image in it; what is beyond is padding, whatever its values;
    - returns `scores` (batch, queries) float32, `labels` (batch, queries) int32, indices into the description's
      `labels`, and `boxes` (batch, queries, 4) float32, (x0, y0, x1, y1) in `pixels`, not clipped.

    FFNs whose selectors always choose the same neurons become the narrower FFNs that they are. Experts compute the
    expert of each token. Other selectors are computed as the plan says, by default with masks.

    Args:
        model: the detector, dense or with a plan.
        path: of the graph.
        size: height and width of `pixels`. Sides that are multiples of the stride are what detectors are evaluated on.
        batch: number of images; None for any.
        format: "stablehlo" or "onnx", which needs the extra `onnx`; None goes by the suffix of `path`.
        platforms: of StableHLO, some of "cpu", "cuda" and "tpu"; None for all of them in one file.
        overwrite: replace files that exist.

    Raises:
        ExistingFileError: if a file exists.
        OutputError: if it cannot be written.
        MissingDependencyError: if the extra `onnx` is needed and not installed.
        InputError: if the size, batch, format or a platform is none, or the format cannot hold what the plan says.
    """
    from detr_jax.run_folder import versions  # with what runs of several processes need, which takes time to import

    path = Path(path)
    description = path.with_name(f"{path.name}.json")
    format = _checked_format(path, format, platforms, model.dtype)
    _check_numbers(size, batch)
    for file in (path, description):
        if file.exists() and not overwrite:
            raise ExistingFileError(f"{file} exists; export under another name or pass overwrite=True")
        refuse_existing(file, overwrite=True)  # but may it be written?

    detector, selectors, computed = _portable(model, format)
    symbol = jax_export.symbolic_shape("b")[0] if batch is None else batch
    inputs = {
        "pixels": jax.ShapeDtypeStruct((symbol, *size, 3), jnp.uint8),
        "sizes": jax.ShapeDtypeStruct((symbol, 2), jnp.int32),
    }
    detect = _detection(detector, selectors, size)
    outputs = jax.eval_shape(detect, *inputs.values())
    if format == "onnx":
        from detr_jax.onnx_graph import onnx_graph  # needs the extra

        graph = onnx_graph(detect, inputs, list(outputs))
    else:
        exported = jax_export.export(jax.jit(detect), platforms=platforms or PLATFORMS)(*inputs.values())
        graph = bytes(exported.serialize())
    plan = model.plan if isinstance(model, SparseDETR) else None
    described = {
        "format": format,
        "inputs": _described(inputs),
        "outputs": _described(outputs),
        "labels": model.labels,
        "preprocessing": dataclasses.asdict(model.preprocessing),
        "platforms": None if format == "onnx" else list(platforms or PLATFORMS),
        "fingerprint": plan.fingerprint if plan else fingerprint(detector),
        "method": plan and plan.method,
        "measured": plan and plan.measured,
        "ffns": computed,
        "versions": versions(),
    }
    write_json(description, described)
    with replacing(path) as temporary:
        temporary.write_bytes(graph)


def _checked_format(path: Path, format: str | None, platforms: Sequence[str] | None, dtype: jnp.dtype) -> str:
    found = path.suffix.removeprefix(".") if format is None else format
    if found not in FORMATS:
        asked = f"the suffix of {path.name}" if format is None else repr(format)
        raise InputError(f"{asked} is no format of a graph; there are {', '.join(FORMATS)}")
    if unknown := set(platforms or ()) - set(PLATFORMS):
        raise InputError(f"there is no platform {min(unknown)!r} to export for; there are {', '.join(PLATFORMS)}")
    if found == "onnx" and platforms is not None:
        raise InputError("platforms are for StableHLO; an ONNX file runs on those of its runtime")
    if found == "onnx" and dtype != jnp.float32:
        raise InputError(f"ONNX is exported in float32, not {jnp.dtype(dtype)}; load the detector with dtype float32")
    return found


def _check_numbers(size: tuple[int, int], batch: int | None) -> None:
    if len(size) != 2 or not all(isinstance(side, int | np.integer) and side > 0 for side in size):
        raise InputError(f"the size is a height and a width in pixels, not {size}")
    if batch is not None and batch < 1:
        raise InputError(f"a batch has at least 1 image, not {batch}; None exports for any number")


def _detection(
    detector: Detector, selectors: dict[str, Selector], size: tuple[int, int]
) -> Callable[[jax.Array, jax.Array], dict[str, jax.Array]]:
    """The function that is exported, see `export`."""

    def detect(pixels: jax.Array, sizes: jax.Array) -> dict[str, jax.Array]:
        rows, columns = (jnp.arange(side) < sizes[:, axis, None] for axis, side in enumerate(size))
        mask = rows[:, :, None] & columns[:, None, :]
        values = jnp.where(mask[..., None], normalise(pixels, detector.preprocessing), 0)
        found = detector.detections(detector(values, mask, selectors=selectors), sizes)
        return {"scores": found.scores, "labels": found.labels, "boxes": found.boxes}

    return detect


def _portable(model: Detector | SparseDETR, format: str) -> tuple[Detector, dict[str, Selector], dict[str, str]]:
    """A detector and selectors that compute the same and can be exported, and how each FFN is computed, in words."""
    if not isinstance(model, SparseDETR):
        return model, {}, dict.fromkeys(model.ffn_specs(), "dense")
    detector, selectors = nnx.clone(model.detector), {}
    computed = dict.fromkeys(detector.ffn_specs(), "dense")
    for name, selector in model.plan.selectors.items():
        if name in detector.token_parts:
            selectors[name], computed[name] = selector, "chosen tokens gathered"
            continue
        ffn = detector.ffns[name]
        if (width := _narrow(ffn, selector)) is not None:
            computed[name] = f"{width} of {detector.ffn_specs()[name].hidden} neurons"
            continue
        selectors[name], computed[name] = _everywhere(name, selector, format)
    return detector, selectors, computed


def _described(arrays: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Shapes, with a letter where any size fits, and types by name, as JSON."""
    shapes = {name: [side if isinstance(side, int) else str(side) for side in a.shape] for name, a in arrays.items()}
    return {name: {"shape": shapes[name], "dtype": array.dtype.name} for name, array in arrays.items()}


def _narrow(ffn: FFN, selector: Selector) -> int | None:
    """Makes an FFN the narrower one that a selector leaves of it, and returns its width; None where inputs decide."""
    traits = getattr(selector, "traits", None)
    if traits is None or traits.dynamic:
        return None
    weights = ffn.parameters()
    hidden, d_model = weights.w_in.shape
    selection = selector(weights, jnp.zeros((1, 1, d_model)), jnp.ones((1, 1), bool))
    whole_blocks = selection.execution is not None and selection.execution.block_size is not None
    if selection.channels is not None or selection.factors is not None or whole_blocks:
        return None
    active = selection.per_token((1, 1), hidden)
    neurons = np.arange(hidden) if active is None else np.flatnonzero(expand_groups(active, hidden))
    w_out, b_out = (weights.w_out, weights.b_out) if selection.second is None else selection.second
    narrow = FFNWeights(weights.w_in[neurons], weights.b_in[neurons], w_out[neurons], b_out)
    for parameter, value in narrow._asdict().items():
        setattr(ffn, parameter, nnx.Param(value))
    return len(neurons)


def _everywhere(name: str, selector: Selector, format: str) -> tuple[Selector, str]:
    """The same selector, computed by what is one program on every platform, or by operators of ONNX; and in words."""
    bare, execution = (selector.selector, selector.execution) if isinstance(selector, Executed) else (selector, None)
    routed = bare if isinstance(bare, RoutedExperts) else None
    if execution is None and routed is None:
        return selector, "masked"
    implementation = (execution and execution.implementation) or PORTABLE[0]
    if implementation not in PORTABLE:
        raise InputError(
            f"{name} is computed by {implementation}, a kernel for one platform that no file can hold; export "
            f"model.with_implementation(...) with masked or {' or '.join(PORTABLE)}"
        )
    if format == "onnx":
        if routed is None:
            raise InputError(
                f"{name} leaves out what its inputs decide about, by loops that do not become ONNX; export the masked "
                'implementation: model.with_implementation("masked"), or --implementation masked'
            )
        implementation = "reference"  # which `onnx_graph` recognises
    portable = Executed(bare, dataclasses.replace(execution or Execution(), implementation=implementation))
    return portable, implementation if routed is None else f"{len(routed.widths)} experts"
