"""Whether what a plan holds is usable, and fits a detector."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from detr_jax.errors import InputError
from detr_jax.kernels import UnavailableError
from detr_jax.models import Detector, FFNWeights, Selector, Selectors
from detr_jax.models.ffn import forward
from detr_jax.plan.plan import Plan


def check_plan(plan: Plan, model: Detector, own: str, source: str) -> None:
    """Checks that a plan was made for a detector with the fingerprint `own`; see `check_fit` for the rest."""
    check_fit(plan.selectors, plan.permutations, model, source)
    if plan.fingerprint != own:
        raise InputError(
            f"{source} was made for the detector {plan.fingerprint[:12]}, this one is {own[:12]}: it knows nothing "
            "about other parameters; make one for this detector with scripts/train_gates.py"
        )


def check_fit(selectors: Selectors, permutations: Mapping[str, np.ndarray], model: Detector, source: str) -> None:
    """Checks selectors and permutations (F,) by name of the FFN, without running the detector.

    Raises:
        InputError: if they name FFNs that the detector does not have, a permutation does not name every neuron once,
            numbers are NaN or infinite (thresholds may be infinite), or shapes do not fit. It names their `source`.
    """
    specs = model.ffn_specs()
    for what, names, more in (("selectors", selectors, model.token_parts), ("permutations", permutations, ())):
        if unknown := set(names) - {*specs, *more}:
            raise InputError(f"{source} has {what} for {sorted(unknown)}; this detector has {tuple(specs)}")
    for name, order in permutations.items():
        hidden = specs[name].hidden
        if not np.array_equal(np.sort(order, axis=None), np.arange(hidden)):
            raise InputError(f"{source}: {name}.permutation does not name each of {hidden} hidden neurons once")
    weights = jax.eval_shape(model.ffn_weights)
    for name, selector in selectors.items():
        leaves = jax.tree_util.tree_leaves_with_path(selector)
        arrays = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
        for entry, array in arrays.items():
            about, is_threshold = f"{source} is damaged: {name}.selector.{entry}", f".{entry}".endswith(".threshold")
            if (np.isnan(array) if is_threshold else ~np.isfinite(array)).any():
                raise InputError(f"{about} holds NaN or infinite values")
            if is_threshold and np.shape(array):
                raise InputError(f"{about} has the shape {np.shape(array)}; a threshold is one number")
        shapes = {entry: np.shape(array) for entry, array in arrays.items()}
        if name in model.token_parts:
            _check_tokens(f"{source}: the selector of tokens", selector, shapes, model)
        else:
            _check_shapes(f"{source}: the selector of {name}", selector, shapes, weights[name])


def _check_tokens(about: str, selector: Any, shapes: dict[str, tuple[int, ...]], model: Detector) -> None:
    tokens = jax.ShapeDtypeStruct((1, 4), bool)
    x = jax.ShapeDtypeStruct((*tokens.shape, model.config.d_model), model.dtype)
    try:
        selector.counts(4, model.config.encoder_layers)
        scores = jax.eval_shape(lambda x, tokens: selector(x, tokens, (3, 1)), x, tokens)
        if scores.shape != tokens.shape:
            raise ValueError("it does not decide token by token")
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{about} does not fit the encoder: {error}; shapes of its arrays: {shapes}") from error


def _check_shapes(about: str, selector: Selector, shapes: dict[str, tuple[int, ...]], weights: FFNWeights) -> None:
    def run(weights: FFNWeights, x: jax.Array, tokens: jax.Array) -> Any:
        """The groups and channels that are selected for each token, and what the FFN makes of that."""
        selection = selector(weights, x, tokens)
        kept = selection.per_token(tokens.shape, len(weights.w_in)), selection.channels
        return kept, forward(weights, x, selection)

    tokens = jax.ShapeDtypeStruct((1, 2), bool)
    x = jax.ShapeDtypeStruct((*tokens.shape, weights.w_in.shape[1]), weights.w_in.dtype)  # as the detector computes
    try:
        kept, _ = jax.eval_shape(run, weights, x, tokens)
        if any(which is not None and which.shape[:-1] != tokens.shape for which in kept):
            raise ValueError("it does not decide token by token")
    except UnavailableError as error:
        raise InputError(f"{about} cannot be computed on this device: {error}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{about} does not fit its FFN: {error}; shapes of its arrays: {shapes}") from error
