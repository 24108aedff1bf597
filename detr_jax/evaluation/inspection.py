"""Activity of the FFNs of a sparse detector for some images, as arrays, and how they are computed."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from detr_jax.evaluation.counts import neurons_computed
from detr_jax.kernels import Dispatch, any_per_tile, repeat_per_tile, signature_order
from detr_jax.kernels.routed import dispatch_routed
from detr_jax.models import Detector, FFNTrace, Selectors


@dataclass(frozen=True)
class FFNExecution:
    """How an FFN is computed on a device.

    Attributes:
        implementation: name of one of `detr_jax.kernels.IMPLEMENTATIONS`; "masked" for the masked reference, "dense"
            where nothing is decided while it runs.
        tile_size: tokens that share their blocks; None for all tokens of an image.
        block_size: neurons per block; None where there are no blocks.
        break_even: share of blocks above which everything is computed, because that is faster; None for never.
        refused: the name of each implementation that would be faster on this device, and why it cannot compute this.
        neurons: neurons that may be computed; None for all.
    """

    implementation: str
    tile_size: int | None = None
    block_size: int | None = None
    break_even: float | None = None
    refused: tuple[tuple[str, str], ...] = ()
    neurons: int | None = None

    def __str__(self) -> str:
        parts = [self.implementation]
        if self.block_size is not None:
            tiles = "images" if self.tile_size is None else f"tiles of {self.tile_size} tokens"
            parts += [tiles, f"blocks of {self.block_size} neurons"]
        if self.neurons is not None:
            parts.append(f"{self.neurons} neurons at most")
        if self.break_even is not None and self.break_even < 1:
            parts.append(f"dense above a density of {self.break_even:g}")
        return "; ".join((", ".join(parts), *(f"not {name}: {reason}" for name, reason in self.refused)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FFNActivity:
    """Activity of one FFN. Neurons are in the plan's order.

    Attributes:
        hidden: (batch, tokens, F) activations as the dense FFN has them for these inputs.
        kept: (batch, tokens, F) bool, the gate map: neurons that the selector keeps.
        channels: (batch, tokens, d) bool, channels of the FFN's input that the selector keeps.
        tokens: (batch, tokens) bool, false for padding.
        executed: () share of the hidden neurons that is computed in the end, see `executed_share`.
        grids: rows and columns of the token grids that the tokens come from, one after the other; none for object
            queries.
        execution: how it was computed.
    """

    hidden: jax.Array
    kept: jax.Array
    channels: jax.Array
    tokens: jax.Array
    executed: jax.Array
    grids: tuple[tuple[int, int], ...] = field(metadata={"static": True})
    execution: FFNExecution = field(metadata={"static": True})

    @property
    def fires(self) -> jax.Array:
        """(batch, tokens, F) bool, neurons with an activation above 0; none of padding."""
        return (self.hidden > 0) & self.tokens[..., None]

    @property
    def firing(self) -> jax.Array:
        """() share of the neurons that fires, of tokens that are no padding."""
        return self._share(self.hidden > 0)

    @property
    def density(self) -> jax.Array:
        """() share of the neurons that the selector keeps, of tokens that are no padding."""
        return self._share(self.kept)

    @property
    def recall(self) -> jax.Array:
        """() share of the firing neurons that the selector keeps; 1 where none fires."""
        fires = self.fires.sum()
        return jnp.where(fires > 0, (self.fires & self.kept).sum() / jnp.maximum(fires, 1), 1.0)

    def _share(self, which: jax.Array) -> jax.Array:
        return (which & self.tokens[..., None]).sum() / (self.tokens.sum() * which.shape[-1])


def activity(trace: FFNTrace, grids: tuple[tuple[int, int], ...]) -> FFNActivity:
    """Activity that a trace shows; jittable."""
    channels = trace.selection.channels
    channels = jnp.ones(trace.inputs.shape, bool) if channels is None else channels
    kept, executed, how = neurons_computed(trace), executed_share(trace), ffn_execution(trace)
    return FFNActivity(trace.hidden, kept, channels, trace.tokens, executed, grids, how)


def _dispatched(trace: FFNTrace) -> tuple[int, int, Dispatch | None]:
    """Numbers of neurons that are always computed and that are decided about, and how the latter are computed."""
    selection = trace.selection
    always, gated = selection.sections or (0, trace.hidden.shape[-1])
    if selection.execution is None or selection.active is None or not gated:
        return always, gated, None
    return always, gated, selection.execution.dispatch(trace.inputs, gated, selection.active.shape[-1])


def _routed_dispatch(trace: FFNTrace) -> Dispatch:
    """How the experts of a trace are computed."""
    selection = trace.selection
    assert selection.routed is not None
    implementation = selection.execution.implementation if selection.execution else None
    return dispatch_routed(trace.inputs, selection.routed.experts.widths, implementation)


def ffn_execution(trace: FFNTrace) -> FFNExecution:
    """How the FFN of a trace is computed on the default device; a trace of shapes alone will do."""
    selection = trace.selection
    if selection.routed is not None:
        dispatch = _routed_dispatch(trace)
        widest = max(selection.routed.experts.widths)
        return FFNExecution(dispatch.backend.name, 1, refused=dispatch.refused, neurons=widest)
    if selection.execution is None:
        return FFNExecution("masked" if jax.tree.leaves(selection) or selection.sections else "dense")
    always, gated, chosen = _dispatched(trace)
    neurons = None if selection.sections is None else always + gated
    if chosen is None:
        return FFNExecution("dense", neurons=neurons)
    name, tile_size = chosen.backend.name, selection.execution.tile_size
    return FFNExecution(name, tile_size, chosen.block_size, chosen.break_even, chosen.refused, neurons)


def execution_report(
    detector: Detector, selectors: Selectors, image_size: tuple[int, int], batch_size: int = 1
) -> dict[str, FFNExecution]:
    """How each FFN of a detector is computed on the default device; see `SparseDETR.execution_report`.

    Traces the detector, computes nothing. `dataclasses.asdict` makes each JSON, `describe` a text.
    """
    images = jax.ShapeDtypeStruct((batch_size, *image_size, 3), jnp.float32)
    traces = jax.eval_shape(
        lambda *held: held[0](held[2], selectors=held[1], trace=True).traces, detector, selectors, images
    )
    return {name: ffn_execution(traces[name]) for name in detector.ffn_specs()}


def describe(report: Mapping[str, FFNExecution]) -> str:
    """A line for each way in which FFNs are computed, with their names."""
    names: dict[FFNExecution, list[str]] = {}
    for name, execution in report.items():
        names.setdefault(execution, []).append(name)
    return "\n".join(f"{', '.join(some)}: {execution}" for execution, some in names.items())


def executed_share(trace: FFNTrace) -> jax.Array:
    """() share of the hidden neurons that is computed in the end, for all tokens and padding.

    It is 1 for the masked reference, else what a tile needs, or everything where that is faster on this device. Experts
    compute whole tiles of tokens.
    """
    selection, execution = trace.selection, trace.selection.execution
    if selection.routed is not None:
        assignment, widths = selection.routed.assignment, selection.routed.experts.widths
        counts = jnp.bincount(assignment.ravel(), length=len(widths) + 1)[:-1]  # without padding
        rows = _routed_dispatch(trace).backend.routed_rows(counts, assignment.size)
        return (rows * jnp.array(widths)).sum() / (assignment.size * trace.hidden.shape[-1])
    if execution is None:
        return jnp.ones(())
    tokens, features = trace.hidden.shape[-2:]
    always, gated, chosen = _dispatched(trace)
    if chosen is None or selection.active is None:
        return jnp.float32(always / features)
    active = repeat_per_tile(selection.active, tokens, selection.tile_size)
    if execution.ordered:
        active = jnp.take_along_axis(active, signature_order(active, active.any(-1))[..., None], axis=1)
    needed = any_per_tile(active, execution.tile_size or tokens, gated // chosen.block_size).mean()
    if chosen.break_even is not None:
        needed = jnp.where(needed > chosen.break_even, 1.0, needed)
    return (always + gated * needed) / features
