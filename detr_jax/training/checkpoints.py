"""Training whose state survives a kill: Orbax checkpoints, written whole or not at all."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


def train_resumably(
    take_step: Callable[[Any, Any, int], tuple[Any, Any]],
    state: Any,
    batches_from: Callable[[int], Iterable[Any]],
    steps: int,
    folder: Path,
    report: Callable[[int, Any], None],
    *,
    checkpoint_steps: int,
    stop: Callable[[int, Any], bool] = lambda step, state: False,
) -> Any:
    """State after all steps, from the latest checkpoint in `folder` on.

    Args:
        take_step: of the state, a batch and the number of steps with this one; returns the next state and its report.
        state: before the first step, a pytree of arrays.
        batches_from: the batches after a number of steps.
        steps: in all.
        folder: of the last two checkpoints.
        report: called after every step with the number of steps and the report; once with None when resuming.
        checkpoint_steps: steps between checkpoints.
        stop: whether to end before all steps; called with the number of steps and the state, as `report` is.

    Raises:
        ValueError: if the checkpoint belongs to a run of other shapes.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:  # waits until everything is on disk
        start = manager.latest_step() or 0
        if start:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = manager.restore(start, args=ocp.args.StandardRestore(abstract))
            report(start, None)
            if stop(start, state):
                return state
        for step, batch in enumerate(batches_from(start), start + 1):
            state, found = take_step(state, batch, step)
            report(step, found)
            if step % checkpoint_steps == 0 or step == steps:
                manager.save(step, args=ocp.args.StandardSave(state))
            if stop(step, state):
                break
    return state
