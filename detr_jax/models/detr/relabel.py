"""Another set of classes for a trained detector, which only the class head knows about."""

import dataclasses
import warnings
from collections import Counter
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from detr_jax.errors import InputError
from detr_jax.models.detr.modeling import DETR
from detr_jax.models.registry import abstract_detector


def with_labels(model: DETR, labels: Sequence[str], seed: int = 0) -> DETR:
    """The detector with a class head for other classes, of which those with new names are still to be trained.

    "No object" and classes that have the name of an earlier one, whatever its case, keep their weights and bias. The
    others are drawn uniformly within 1 / sqrt(d), as `torch.nn.Linear` does in the official code. Warns about the
    classes that are new; everything else is shared with the detector that is given, which stays as it is.

    Args:
        labels: names of the classes; class i is `labels[i]`.
        seed: of the new weights.

    Raises:
        InputError: if there are no names, one is empty, or two are the same.
    """
    if tuple(labels) == tuple(model.labels):
        return model
    if isinstance(labels, str) or not labels or not all(isinstance(label, str) and label.strip() for label in labels):
        raise InputError(f"labels must be a list of at least one class name, none of them empty, not {labels!r}")
    keys, old = ([label.strip().casefold() for label in names] for names in (labels, model.labels))
    if repeated := [label for label, key in zip(labels, keys, strict=True) if Counter(keys)[key] > 1]:
        raise InputError(f"labels must differ whatever their case, but there are {', '.join(repeated)}")
    kept = {new: old.index(key) for new, key in enumerate(keys) if old.count(key) == 1} | {len(labels): len(old)}

    values = dict(nnx.to_flat_state(nnx.state(model)))
    kernel, bias = (np.asarray(values["class_head", name][...]) for name in ("kernel", "bias"))
    width = len(kernel)
    drawn = np.random.default_rng(seed).uniform(-1, 1, (width + 1, len(labels) + 1)) / np.sqrt(width)
    drawn[:, list(kept)] = np.concatenate([kernel, bias[None]])[:, list(kept.values())]
    for name, value in (("kernel", drawn[:-1]), ("bias", drawn[-1])):
        values["class_head", name] = values["class_head", name].replace(jnp.asarray(value, jnp.float32))
    graph = nnx.graphdef(abstract_detector(dataclasses.replace(model.config, labels=tuple(labels)), model.dtype))
    names = [labels[new] for new in kept if new < len(labels)]
    warnings.warn(
        f"the class head is another one: it keeps {', '.join(['no object', *names])} and is new, to be trained, for "
        f"{', '.join(label for new, label in enumerate(labels) if new not in kept) or 'no class'}",
        stacklevel=3,
    )
    return nnx.merge(graph, nnx.from_flat_state(list(values.items())))
