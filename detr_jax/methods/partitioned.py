"""Neurons in three sections: always computed, decided about, never computed; a fixed set is the first alone."""

import dataclasses
from dataclasses import dataclass, field

import jax

from detr_jax.methods.base import Traits
from detr_jax.models import FFNWeights, OutputLayer, Partition, Selection, Selector
from detr_jax.pytrees import pytree


@pytree
@dataclass(frozen=True)
class PartitionedSelector:
    """Computes the first neurons always, asks a selector about the next ones, and never computes the rest.

    The order of the neurons, a part of a plan, brings them into their sections.

    Attributes:
        gate: selector of the gated neurons, as of an FFN that has no others; None where there are none.
        always: number of neurons that are always computed.
        gated: number of neurons that the gate decides about.
        second: a second layer, of the first two sections, that makes up for the third; None for the FFN's own.
    """

    gate: Selector | None
    always: int = field(metadata={"static": True})
    gated: int = field(default=0, metadata={"static": True})
    second: OutputLayer | None = None

    def __call__(self, ffn: FFNWeights, x: jax.Array, tokens: jax.Array) -> Selection:
        """Selects.

        Raises:
            ValueError: if the FFN has fewer neurons than the sections.
        """
        sections = Partition(self.always, self.gated)
        if sections.always + sections.gated > len(ffn.w_in):
            raise ValueError(f"sections of {self.always} and {self.gated} neurons do not fit an FFN of {len(ffn.w_in)}")
        _, gated = sections.parts(ffn)
        selection = Selection() if self.gate is None else self.gate(gated, x, tokens)
        return dataclasses.replace(selection, sections=sections, second=self.second)

    @property
    def traits(self) -> Traits:
        if self.gate is None:
            return Traits("statistics", "neuron", "both", dynamic=False)
        return self.gate.traits

    def cost(self, d_model: int, features: int) -> float:
        """Multiply-adds per token of the decision."""
        return 0.0 if self.gate is None else self.gate.cost(d_model, self.gated)
