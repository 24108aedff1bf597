"""Training state that survives a kill: Orbax checkpoints, written whole or not at all."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The latest checkpoints of one run.

    Args:
        folder: where they are kept.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, state: Any) -> None:
        """Stores `state`, a pytree of arrays, as the state before step `step`."""
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """The latest complete checkpoint as (step, state), or None.

        Args:
            like: a pytree of arrays with the structure, shapes and dtypes expected.

        Raises:
            ValueError: if the checkpoint belongs to a run of other shapes.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return step, self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
