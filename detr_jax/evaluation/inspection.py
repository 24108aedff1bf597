"""What happens in the FFNs of a sparse detector for some images, as arrays."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from detr_jax.evaluation.counts import neurons_computed
from detr_jax.kernels import any_per_tile, repeat_per_tile, signature_order
from detr_jax.kernels.dispatch import FFNShape, choose
from detr_jax.models import FFNTrace


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FFNActivity:
    """What happened in one FFN. Neurons are in the plan's order.

    Attributes:
        hidden: (batch, tokens, F) activations as the dense FFN has them for these inputs.
        kept: (batch, tokens, F) bool, the gate map: neurons that the selector keeps.
        channels: (batch, tokens, d) bool, channels of the FFN's input that the selector keeps.
        tokens: (batch, tokens) bool, false for padding.
        executed: () share of the hidden neurons that is computed in the end, for all tokens and padding: 1 for the
            masked reference; else whatever a tile needs, or everything where that is faster on this device.
        grid: rows and columns of the tokens; None for object queries.
    """

    hidden: jax.Array
    kept: jax.Array
    channels: jax.Array
    tokens: jax.Array
    executed: jax.Array
    grid: tuple[int, int] | None = field(metadata={"static": True})

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


def activity(trace: FFNTrace, grid: tuple[int, int] | None) -> FFNActivity:
    """What a trace shows; jittable."""
    kept_channels = trace.selection.channels
    return FFNActivity(
        hidden=trace.hidden,
        kept=neurons_computed(trace),
        channels=jnp.ones(trace.inputs.shape, bool) if kept_channels is None else kept_channels,
        tokens=trace.tokens,
        executed=executed_share(trace),
        grid=grid,
    )


def executed_share(trace: FFNTrace) -> jax.Array:
    """() share of the hidden neurons that is computed in the end, see `FFNActivity.executed`."""
    selection, execution = trace.selection, trace.selection.execution
    if execution is None:
        return jnp.ones(())
    tokens, features = trace.hidden.shape[-2:]
    always, gated = selection.sections or (0, features)
    if not gated:
        return jnp.float32(always / features)
    active = repeat_per_tile(selection.active, tokens, selection.tile_size)
    if execution.ordered:
        active = jnp.take_along_axis(active, signature_order(active, active.any(-1))[..., None], axis=1)
    tile_size, blocks = execution.tile_size or tokens, gated // execution.block_size
    needed = any_per_tile(active, tile_size, blocks).mean()
    ffn_shape = FFNShape(
        *(trace.inputs.dtype, tile_size, trace.inputs.shape[-1], gated, blocks),
        groups=active.shape[-1] if execution.exact else None,
        tokens=trace.tokens.size,
    )
    break_even = choose(ffn_shape, execution.implementation).break_even
    if break_even is not None:
        needed = jnp.where(needed > break_even, 1.0, needed)
    return (always + gated * needed) / features
