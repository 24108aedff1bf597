"""Command-line options for the computation of FFNs whose selectors leave groups out."""

from dataclasses import dataclass
from typing import Literal

from detr_jax.errors import InputError
from detr_jax.kernels import IMPLEMENTATIONS, Execution
from detr_jax.methods import executed
from detr_jax.models import Selectors


@dataclass(frozen=True)
class ExecutionOptions:
    """Computation of FFNs whose selectors leave groups out."""

    implementation: Literal["plan", "masked", "auto", *IMPLEMENTATIONS] = "plan"
    """plan is the plan's own; masked computes everything and ignores what is not selected; the others leave it out;
    auto is the fastest of them on this device."""
    tile_size: int | None = None
    """Tokens that share what is computed; default all of an image. Not for plan and masked."""
    block_size: int | None = None
    """Neurons that are computed together; default a group, or the smallest number of groups that the implementation
    takes. Not for plan and masked."""
    per_token_mask: bool = False
    """Compute for each token of a tile its own groups only, instead of all that the tile needs. Not for plan and
    masked."""
    sort_tokens: bool = False
    """Bring tokens that need the same groups together into tiles, and back afterwards. Not for plan and masked."""

    def of(self, selectors: Selectors) -> Selectors:
        """The selectors, computed in this way.

        Raises:
            InputError: if an option is given that the implementation does not have.
        """
        if self.implementation in ("plan", "masked"):
            if self != ExecutionOptions(self.implementation):
                raise InputError(
                    "--tile-size, --block-size, --per-token-mask and --sort-tokens need an --implementation that "
                    f"leaves groups out: auto or {', '.join(IMPLEMENTATIONS)}, not {self.implementation}"
                )
            return selectors if self.implementation == "plan" else executed(selectors, None)
        named = None if self.implementation == "auto" else self.implementation
        execution = Execution(self.tile_size, self.block_size, self.per_token_mask, self.sort_tokens, named)
        return executed(selectors, execution)
