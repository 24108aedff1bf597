"""Detectors from the hub, from files and from the package, dense or with a plan, and back into files."""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from detr_jax import hub
from detr_jax.convert import Checkpoint, Facts, open_checkpoint, write_checkpoint
from detr_jax.errors import InputError, MissingFileError
from detr_jax.kernels import Execution
from detr_jax.models import DETR, PRESETS, Detector, preset_config
from detr_jax.models.detr.relabel import with_labels
from detr_jax.models.parameters import named_parameters
from detr_jax.models.registry import abstract_detector
from detr_jax.plan import Plan, load_plan
from detr_jax.sparse import SparseDETR
from detr_jax.weights import EMBEDDED, detector_file

# Commits of 2023 with model.safetensors; those of the others could not be looked up when this was written.
HUB = {
    "detr-r50": ("facebook/detr-resnet-50", "1d5f47bd3bdd2c4bbfa585418ffe6da5028b4c0b"),
    "detr-r50-dc5": ("facebook/detr-resnet-50-dc5", "main"),
    "detr-r101": ("facebook/detr-resnet-101", "main"),
    "detr-r101-dc5": ("facebook/detr-resnet-101-dc5", "96317ca979e231bd960cb3cac31328e0165a3e94"),
    "table-transformer-detection": ("microsoft/table-transformer-detection", "main"),
    "table-transformer-structure": ("microsoft/table-transformer-structure-recognition", "main"),
    "table-transformer-structure-v1.1": ("microsoft/table-transformer-structure-recognition-v1.1-all", "main"),
    "deformable-detr-single-scale": ("SenseTime/deformable-detr-single-scale", "main"),
    "deformable-detr-single-scale-dc5": ("SenseTime/deformable-detr-single-scale-dc5", "main"),
    "deformable-detr": ("SenseTime/deformable-detr", "main"),
    "deformable-detr-with-box-refine": ("SenseTime/deformable-detr-with-box-refine", "main"),
    "deformable-detr-with-box-refine-two-stage": ("SenseTime/deformable-detr-with-box-refine-two-stage", "main"),
}
_FACTS = ["config.json", "preprocessor_config.json"]
_FILES = ["model*.safetensors", "model.safetensors.index.json", *_FACTS]
_TORCH_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json", *_FACTS]
"""Of repositories that hold no safetensors."""
_REMEDY = (
    "load a file: detr_jax.load('model.safetensors', preset='detr-r50'). detr_jax.load('detr-tiny') needs no download."
)


def load(
    name_or_path: str | Path,
    preset: str | None = None,
    dtype: jnp.dtype = jnp.float32,
    *,
    labels: Sequence[str] | None = None,
) -> Detector:
    """A detector with its trained parameters, which are float32 whatever `dtype` is.

    Args:
        name_or_path: name of a preset (`detr-tiny` and `deformable-tiny` come with the package, the others from the
            Hugging Face hub); file or folder: an official `.pth` or another file of torch (needs the `torch` extra),
            safetensors of Hugging Face's DETR, Table Transformer, Conditional or Deformable DETR (with timm's or
            transformers' names for the backbone, whole or in shards) or of `detr_jax.save`; or id of a repository on
            the hub that holds such a folder. Hugging Face's `config.json` and `preprocessor_config.json` beside a file
            or in the folder tell class names, heads, dilation and preprocessing.
        preset: name of the preset whose architecture the checkpoint has; needed for a DC5 detector without a
            `config.json`, because nothing else says that it is DC5.
        dtype: of the computation.
        labels: names of other classes, to fine-tune the detector on: the class head keeps what it knows of them, and
            a warning says what is new. None keeps the detector's classes.

    Raises:
        MissingFileError: if there is no such file, or it can neither be downloaded nor is in the hub's cache.
        MissingDependencyError: if a `.pth` is to be read and torch is not installed.
        InputError: if the checkpoint is damaged, incomplete, of an unknown layout, contradicts the preset or the
            `config.json`, or is of a function or preprocessing that is not supported; or if `labels` are none.
    """
    if labels is not None:
        model = load(name_or_path, preset, dtype)
        if type(model) is not DETR:  # a Conditional DETR has neither "no object" nor this loss
            raise InputError(f"labels= is for a DETR; {name_or_path} is a {type(model).__name__}")
        return with_labels(model, labels)
    name = str(name_or_path)
    if name in PRESETS:
        if preset not in (None, name):
            raise InputError(f"{name!r} is a preset itself and cannot be loaded as {preset!r}")
        if name in EMBEDDED:
            with detector_file(name) as path:
                return build(open_checkpoint(path, name), dtype)
        path = hub.download(*HUB[name], filename="model.safetensors", remedy=_REMEDY)
        config = preset_config(name)
        facts = Facts(labels=config.labels, dilation=config.backbone.dilate_last, preprocessing=config.preprocessing)
        return build(open_checkpoint(path, name, facts), dtype)
    path = Path(name_or_path)
    if not path.exists():
        if not hub.is_id(name):
            raise MissingFileError(
                f"there is no file or folder {name!r}, and no preset of that name ({', '.join(PRESETS)}). A repository "
                "on the Hugging Face hub is named owner/name, or hf://owner/name where a folder is named like its owner"
            )
        path = hub.download_folder(name, patterns=_FILES, remedy=_REMEDY)
        if not any(path.glob("model*.safetensors")):
            path = hub.download_folder(name, patterns=_TORCH_FILES, remedy=_REMEDY)
    return build(open_checkpoint(path, preset), dtype)


def load_sparse(
    model: str | Path | Detector,
    plan: str | Path | Plan | None = None,
    *,
    implementation: str | Execution | None = None,
    preset: str | None = None,
    dtype: jnp.dtype | None = None,
) -> SparseDETR:
    """A frozen detector whose FFNs are made sparse by a plan; called like the dense one.

    Args:
        model: a detector, or a name or path for `load`.
        plan: a plan, or a name or path for `load_plan`. None is the one that comes with the detector: for `detr-tiny`
            and `deformable-tiny` in the package, for a folder or a repository on the hub its `plan.safetensors`.
        implementation: see `SparseDETR.with_implementation`. None is that of the plan, by default the masked reference,
            which computes everything: right everywhere, faster nowhere. "auto" leaves work out.
        preset, dtype: see `load`; not for a detector, which has its own.

    Raises:
        MissingFileError, MissingDependencyError: see `load`; also if no plan comes with the detector.
        InputError: if the checkpoint or the plan is damaged, the plan was made for another detector, the
            implementation is unknown or cannot compute it, or a preset or dtype is given for a detector.

    >>> import detr_jax
    >>> from detr_jax.data.scenes import ScenesDataset
    >>> model = detr_jax.load_sparse("detr-tiny")
    >>> model.plan.method, len(model.plan.selectors)
    ('mgs', 6)
    >>> model.detect(ScenesDataset("val", 1)[0].image).names
    ('ring', 'star', 'cross')
    """
    if isinstance(model, Detector):
        if plan is None:
            raise InputError("a detector does not say where its plan is: pass plan=, a path, a hub id or a Plan")
        if (preset, dtype) != (None, None):
            raise InputError("preset= and dtype= are for detectors that are loaded here; this one is loaded already")
        dense = model
    else:
        dense, plan = load(model, preset, dtype or jnp.float32), _own_plan(model) if plan is None else plan
    if isinstance(plan, Plan):
        sparse = SparseDETR.of(dense, plan)
    else:
        sparse = SparseDETR.of_checked(dense, load_plan(plan, dense))
    return sparse if implementation is None else sparse.with_implementation(implementation)


def save(model: Detector, path: str | Path) -> None:
    """Writes a detector's configuration and parameters to a safetensors file, which `load` reads."""
    arrays = {name: np.asarray(array) for name, array in named_parameters(model).items()}
    write_checkpoint(Path(path), model.config, arrays)


def build(checkpoint: Checkpoint, dtype: jnp.dtype = jnp.float32) -> Detector:
    """The detector of an opened checkpoint. No parameter is initialised, and each is placed as it is read.

    Raises:
        InputError: if entries are missing, left over or misshapen, or hold NaN or infinite values.
    """
    graph, state = nnx.split(abstract_detector(checkpoint.config, dtype))
    leaves = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    arrays = checkpoint.arrays({name: leaf.shape for name, (_, leaf) in leaves.items()})
    placed = [(leaves[name][0], leaves[name][1].replace(jnp.asarray(array))) for name, array in arrays]
    return nnx.merge(graph, nnx.from_flat_state(placed))


def _own_plan(name_or_path: str | Path) -> str | Path:
    """Name for `load_plan` of the plan that comes with a detector."""
    path = Path(name_or_path)
    if str(name_or_path) in EMBEDDED or path.is_dir() or (hub.is_id(name_or_path) and not path.exists()):
        return name_or_path
    raise MissingFileError(
        f"no plan comes with {str(name_or_path)!r}: make one with scripts/train_gates.py --model {name_or_path} and "
        "pass its path as plan="
    )
