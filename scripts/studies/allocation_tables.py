"""Tables and choices of allocations that only studies have."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detr_jax.calibration.allocation import Choice
from detr_jax.errors import InputError, MissingFileError


def within_loss(losses: np.ndarray, bound: float) -> Choice:
    """The last setting of each FFN, the others dense, whose loss stays within a bound.

    Args:
        losses: (FFNs, settings), the loss with one FFN at each setting and the others dense; the first one is dense.
        bound: on the loss.

    Raises:
        ValueError: if the bound is negative or NaN.
    """
    if not bound >= 0:
        raise InputError(f"a bound on a loss must be at least 0, not {bound}")
    return tuple(int(np.flatnonzero(np.append(True, row[1:] <= bound))[-1]) for row in losses)


def cost_table(path: Path, names: Sequence[str], densities: np.ndarray) -> np.ndarray:
    """Reads what each FFN costs at each density, such as measured milliseconds.

    Args:
        path: JSON, {FFN: {density: cost}}; between two densities of the file costs are interpolated.
        names: of the FFNs.
        densities: (settings,) falling from 1.

    Returns:
        (FFNs, settings) as shares of what all FFNs cost dense.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if an FFN is missing, or its densities do not reach from the sparsest to 1, or costs are no numbers.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        rows = {name: sorted((float(d), float(cost)) for d, cost in row.items()) for name, row in table.items()}
    except FileNotFoundError:
        raise MissingFileError(f"there is no file {path} with costs") from None
    except (json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no table of costs {{FFN: {{density: cost}}}}: {error}") from error
    costs = []
    for name in names:
        if not rows.get(name):
            raise InputError(f"{path} has no costs of {name}; it has {', '.join(rows)}")
        known, cost = np.array(rows[name]).T
        if known[0] > densities[-1] or known[-1] < 1 or not np.isfinite(cost).all():
            raise InputError(f"{path}: the costs of {name} must be finite, for densities from {densities[-1]:g} to 1")
        costs.append(np.interp(densities, known, cost))
    # What is measured may be no faster for being sparser; it is never worth more than the best denser setting.
    falling = np.minimum.accumulate(np.array(costs), axis=1)
    return falling / falling[:, 0].sum()
