"""Command-line options that say how FFNs are computed where a selector leaves groups out."""

from dataclasses import dataclass
from typing import Literal

from detr_jax.kernels import IMPLEMENTATIONS, Execution
from detr_jax.methods import executed
from detr_jax.models import Selectors


@dataclass(frozen=True)
class ExecutionOptions:
    """How FFNs are computed where a selector leaves groups out."""

    implementation: Literal["masked", "auto", *IMPLEMENTATIONS] = "masked"
    """masked computes everything and ignores what is not selected; the others leave it out; auto is the fastest of them
    on this device."""
    tile_size: int | None = None
    """Tokens that share what is computed; default all of an image. Not for masked."""
    block_size: int = 8
    """Neurons that are computed together. Not for masked."""
    exact: bool = False
    """Compute for each token of a tile its own groups only, instead of all that the tile needs. Not for masked."""
    ordered: bool = False
    """Bring tokens that need the same groups together into tiles, and back afterwards. Not for masked."""

    def of(self, selectors: Selectors) -> Selectors:
        """The selectors, computed so, whatever they say themselves."""
        if self.implementation == "masked":
            return executed(selectors, None)
        named = None if self.implementation == "auto" else self.implementation
        execution = Execution(self.tile_size, self.block_size, self.exact, self.ordered, named)
        return executed(selectors, execution)

    @property
    def title(self) -> str:
        """For results."""
        if self.implementation == "masked":
            return "masked reference"
        tiles = "images" if self.tile_size is None else f"tiles of {self.tile_size} tokens"
        title = f"{self.implementation}, {tiles}, blocks of {self.block_size}"
        return title + (", exact" if self.exact else "") + (", ordered" if self.ordered else "")
