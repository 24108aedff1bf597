"""A selector whose groups are really left out, by the sparse FFN operation instead of the masked reference."""

import dataclasses

import jax

from detr_jax.errors import InputError
from detr_jax.kernels import Execution
from detr_jax.methods.base import Wrapper, storable
from detr_jax.methods.token_gates import GatedTokens
from detr_jax.models import FFNWeights, Selection, Selector, Selectors


@storable
class Executed(Wrapper):
    """Another selector, which decides about groups or neurons, and how the FFN computes what it selects."""

    selector: Selector
    execution: Execution = dataclasses.field(metadata={"static": True})

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> Selection:
        """Raises an InputError if the selector leaves out channels or compensates: only the masked reference can."""
        selection = self.selector(ffn, x, tokens)
        fixed = selection.sections is not None and not selection.sections.gated
        groups = selection.active is not None or fixed or selection.routed is not None
        if not groups or selection.channels is not None or selection.factors is not None:
            raise InputError(
                f"{type(self.selector).__name__} does not choose groups of neurons alone, so it runs in the masked "
                "reference only"
            )
        if selection.active is not None and selection.tile_size == 1 and not fixed:
            # Padding needs nothing, or it would make tiles denser.
            selection = dataclasses.replace(selection, active=selection.active & tokens[..., None])
        return dataclasses.replace(selection, execution=self.execution)


def computation_of(selectors: Selectors) -> str:
    """How FFNs with these selectors are computed: "masked" by the reference, or what leaves work out."""

    def of_one(selector: Selector) -> str:
        return str(selector.execution) if isinstance(selector, Executed) else getattr(selector, "computation", "masked")

    return ", ".join(sorted(set(map(of_one, selectors.values()))))


def executed(selectors: Selectors, execution: Execution | None) -> dict[str, Selector]:
    """The same selectors computed in another way; None is the masked reference. Those of tokens stay as they are."""
    bare = {name: s.selector if isinstance(s, Executed) else s for name, s in selectors.items()}
    if execution is None:
        return bare
    return {name: s if isinstance(s, GatedTokens) else Executed(s, execution) for name, s in bare.items()}
