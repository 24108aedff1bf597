"""Narrow experts in XLA: tokens are sorted by expert, and each expert goes through its own rows, tile by tile.

Rows are sorted without padding and computed in place: an expert takes large tiles while they fit and ever smaller ones
for the rest, of which the last keeps the rows of the next expert as they are. All shapes are static but the number of
tiles, so that nothing recompiles with the data, and no expert can overflow. Following trials on a CPU: loops with
weights of their own beat one loop that looks weights up, and several sizes of tiles beat one.
"""

from functools import partial

import jax
import jax.numpy as jnp

from detr_jax.kernels.experts import Experts, group_tokens


def tile_sizes(tokens: int, experts: int) -> tuple[int, ...]:
    """Tokens per tile, largest first. Small tiles waste fewer rows, large ones run at a higher rate; measured."""
    mean = tokens / max(experts, 1) if isinstance(tokens, int) else 256  # not a symbol of `jax.export`
    return *(size for size in (1024, 256, 64) if size <= 1.5 * mean), 16


def rows_computed(counts: jax.Array, tokens: int) -> jax.Array:
    """(C,) rows that experts with (C,) tokens of T in all compute: whole small tiles."""
    size = tile_sizes(tokens, len(counts))[-1]
    return -(-counts // size) * size


def run(x: jax.Array, experts: Experts, assignment: jax.Array) -> jax.Array:
    """As `experts.routed_ffn` for x (T, d) and an assignment (T,)."""
    tokens, count = x.shape[0], len(experts.b_out)
    sizes = tile_sizes(tokens, count)
    order, ends = group_tokens(assignment, count)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    # Tiles that reach behind the last row need rows to read.
    rows = jnp.pad(x.at[order].get(mode="promise_in_bounds"), ((0, sizes[0]), (0, 0)))
    for first, w_in, b_in, w_out in zip(experts.first, *experts[:3], strict=True):

        def one(i, rows, first=first, stack=(w_in, b_in, w_out)):
            expert = (*(array[i] for array in stack), experts.b_out[first + i])
            return _expert(rows, expert, starts[first + i], ends[first + i], sizes)

        rows = one(0, rows) if len(w_in) == 1 else jax.lax.fori_loop(0, len(w_in), one, rows)
    places = (
        jnp.zeros(tokens, jnp.int32)
        .at[order]
        .set(jnp.arange(tokens, dtype=jnp.int32), unique_indices=True, mode="promise_in_bounds")
    )
    outputs = rows.at[places].get(mode="promise_in_bounds")
    return jnp.where((assignment < count)[:, None], outputs, 0)


def _expert(rows, expert, start, end, sizes):
    """The rows from `start` to `end` through one expert, in place."""
    w_in, b_in, w_out, b_out = expert

    def tile(size, start, i, rows):
        at = start + i * size
        x = jax.lax.dynamic_slice_in_dim(rows, at, size)
        y = (jax.nn.relu(x @ w_in.T + b_in) @ w_out + b_out).astype(x.dtype)
        if size == sizes[-1]:
            y = jnp.where((at + jnp.arange(size) < end)[:, None], y, x)
        return jax.lax.dynamic_update_slice_in_dim(rows, y, at, axis=0)

    for size in sizes:
        left = end - start
        tiles = -(-left // size) if size == sizes[-1] else left // size
        rows = jax.lax.fori_loop(0, tiles, partial(tile, size, start), rows)
        start += tiles * size
    return rows
