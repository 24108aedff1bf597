"""The optimiser of detectors: AdamW with two learning rates (Carion et al. 2020, section A.4)."""

from functools import partial
from typing import Any

import jax
import optax


def adamw_of_parts(
    backbone: optax.Schedule, rest: optax.Schedule, weight_decay: float, gradient_norm: float
) -> optax.GradientTransformation:
    """AdamW on gradients clipped to a norm, with a learning rate of its own for the backbone."""

    def part_of(path: tuple[Any, ...], _: jax.Array) -> str:
        return "backbone" if "backbone" in jax.tree_util.keystr(path) else "rest"

    rates = {"backbone": backbone, "rest": rest}
    parts = {name: optax.adamw(rate, weight_decay=weight_decay) for name, rate in rates.items()}
    return optax.chain(
        optax.clip_by_global_norm(gradient_norm), optax.partition(parts, partial(jax.tree.map_with_path, part_of))
    )
