"""Training gates for all FFNs on frozen weights: those of MGS (arXiv 2510.09380) and its relatives, in one pass."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from detr_jax.data.batches import BatchSource
from detr_jax.errors import InputError
from detr_jax.mesh import mesh_of, replicate_like, replicated
from detr_jax.methods import ContributionGate, Gate, LinearGate, LowRankGate, PooledGate, Thresholded
from detr_jax.methods.base import group_sums
from detr_jax.methods.grouping import active_groups, group_count
from detr_jax.methods.tiles import mean_of_tokens
from detr_jax.models import FFNTrace, FFNWeights
from detr_jax.models.standalone import HasFFNs
from detr_jax.training.checkpoints import Checkpoints

PAPER_GROUP_SIZE = 8
PAPER_THRESHOLD = 0.5

Gates = dict[str, Gate]
"""Gate of each FFN by name."""
Objective = Literal["firing", "balanced", "contribution", "norm", "share"]


@dataclass(frozen=True)
class GateSpec:
    """One way of making gates."""

    objective: Objective = "firing"
    """What a gate learns, see `gate_loss`."""
    rank: int | None = None
    """Of a gate of two layers (Deja Vu); None for one linear layer (MGS)."""
    pooled: Literal["features", "contributions"] | None = None
    """What a gate of two layers pools to decide once for all tokens of an image; it learns shares."""

    def __post_init__(self):
        if (self.pooled is None) != (self.objective != "share") or (self.pooled and self.rank is None):
            raise InputError(f"gates that learn shares are pooled and have a rank, and no others are pooled: {self}")


MGS = GateSpec()
KINDS = {
    "firing": MGS,
    "contribution": GateSpec("contribution"),
    "balanced": GateSpec("balanced", rank=16),
    "norm": GateSpec("norm"),
    "features": GateSpec("share", rank=64, pooled="features"),
    "contributions": GateSpec("share", rank=16, pooled="contributions"),
}
"""What `sparsity.methods` are made from: MGS, MGS with weighted labels, Deja Vu, D2DMoE, and two that are pooled."""


@dataclass(frozen=True)
class GateTraining:
    """How gates are trained. Group size, epochs, labels and loss are the paper's; it does not name the optimiser."""

    group_size: int = PAPER_GROUP_SIZE
    """Hidden neurons per gate."""
    epochs: int = 5
    """Passes over the training images."""
    batch_size: int = 8
    """Images per step."""
    learning_rate: float = 3e-3
    """Peak learning rate of Adam, which decays to 0 along a cosine."""
    seed: int = 0
    """Order of the images, and first values of gates of two layers."""
    checkpoint_steps: int = 200
    """Steps between checkpoints."""

    def __post_init__(self):
        for name in ("group_size", "epochs", "batch_size", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")


def initial_gate(kind: GateSpec, d_model: int, groups: int, key: jax.Array) -> Gate:
    """A gate that gives every group even odds, whatever the input.

    The loss of one linear layer is convex, so zeros are as good a start as any; of two layers one must differ.

    Raises:
        ValueError: if the rank is not positive.
    """
    if kind.rank is None:
        return LinearGate(jnp.zeros((d_model, groups)), jnp.zeros(groups))
    if kind.rank < 1:
        raise InputError(f"the rank of a gate must be at least 1, not {kind.rank}")
    down = jax.nn.initializers.lecun_normal()(key, (d_model, kind.rank))
    up, bias = jnp.zeros((kind.rank, groups)), jnp.zeros(groups)
    if kind.pooled == "features":
        return PooledGate(down, jnp.zeros(kind.rank), up, bias)
    if kind.pooled == "contributions":
        return ContributionGate(down, up, bias)
    return LowRankGate(down, up, bias)


def output_norms(weights: FFNWeights, hidden: jax.Array, groups: int) -> jax.Array:
    """(..., F) activations -> (..., G) norms ||h_g W_out,g|| of what each group adds to the output."""
    rows = weights.w_out.astype(jnp.float32).reshape(groups, -1, weights.w_out.shape[-1])
    gram = jnp.einsum("gid,gjd->gij", rows, rows)
    grouped = hidden.astype(jnp.float32).reshape(*hidden.shape[:-1], groups, -1)
    return jnp.sqrt(jnp.maximum(jnp.einsum("...gi,gij,...gj->...g", grouped, gram, grouped), 0))


def gate_loss(objective: Objective, gate: Gate, weights: FFNWeights, trace: FFNTrace) -> jax.Array:
    """The loss of a gate, averaged over groups and tokens.

    - `firing`: binary cross-entropy with whether the group fires (MGS).
    - `balanced`: the same, where silent groups weigh as much as the share of firing ones + 0.005 (Liu et al. 2023,
      "Deja Vu").
    - `contribution`: the same, where a firing group weighs as much as it adds to the output, in units of the mean.
    - `norm`: squared error between the softplus of the score and what the group adds to the output, in the same units
      (Szatkowski et al. 2024, "D2DMoE").
    - `share`: of a pooled gate, cross-entropy between the softmax of the scores and the shares that groups have in the
      sum over the window's tokens and the neurons of h_j ||W_out[j]||. A budget of the largest scores then leaves out
      least (ours).

    Args:
        objective: which of them.
        gate: of the FFN.
        weights: of the FFN.
        trace: what went through it.
    """
    scores = gate(weights, trace.inputs, trace.tokens)
    if objective == "share":
        return _share_loss(scores, weights, trace, gate.traits.tile_size)
    fires = active_groups(trace.hidden, scores.shape[-1])
    counted = trace.tokens[..., None]
    if objective in ("contribution", "norm"):
        # Padding may add to the output; in a unit that is 0 without it, that would be infinitely much.
        norms = jnp.where(counted, output_norms(weights, trace.hidden, scores.shape[-1]), 0)
        unit = norms.sum() / jnp.maximum((fires & counted).sum(), 1)
        contributions = norms / jnp.maximum(unit, jnp.finfo(jnp.float32).tiny)
    if objective == "norm":
        losses = (jax.nn.softplus(scores) - contributions) ** 2
    else:
        losses = optax.sigmoid_binary_cross_entropy(scores, fires.astype(scores.dtype))
    if objective == "balanced":
        density = (fires & counted).sum() / jnp.maximum(counted.sum() * fires.shape[-1], 1)
        losses = jnp.where(fires, losses, losses * (density + 0.005))
    if objective == "contribution":
        losses = jnp.where(fires, losses * contributions, losses)
    return jnp.where(counted, losses, 0).sum() / jnp.maximum(counted.sum() * scores.shape[-1], 1)


def _share_loss(scores: jax.Array, weights: FFNWeights, trace: FFNTrace, window: int | None) -> jax.Array:
    norms = jnp.linalg.norm(weights.w_out.astype(jnp.float32), axis=1)
    per_token = group_sums(trace.hidden.astype(jnp.float32) * norms, scores.shape[-1])
    contributions = mean_of_tokens(per_token, trace.tokens, window)
    total = contributions.sum(-1, keepdims=True)
    shares = contributions / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)  # none where nothing fires
    return -(shares * jax.nn.log_softmax(scores)).sum() / jnp.maximum((total > 0).sum(), 1)


def train_gates(
    ffns_of: HasFFNs,
    passes: BatchSource,
    kinds: Mapping[str, GateSpec],
    training: GateTraining,
    folder: Path,
    report: Callable[[int, jax.Array], None],
    *,
    running: Mapping[str, Mapping[str, Thresholded]] | None = None,
    start: Mapping[str, Gates] | None = None,
) -> dict[str, Gates]:
    """Trains gates of several kinds for every FFN, or goes on from the latest checkpoint in `folder`.

    The frozen weights are an argument of the compiled step that no gradient is taken of and nothing is returned of:
    they stay as they are, bit for bit.

    Devices that the carrier was replicated over share every batch, see `detr_jax.mesh`.

    Args:
        carrier: of the FFNs, frozen.
        passes: training data.
        kinds: of gates, by name.
        training: the recipe.
        folder: for checkpoints.
        report: called after every step with the number of steps taken so far and the mean loss of the gates.
        running: gates with thresholds of each kind to start from. They are in effect while they are trained, so that
            each learns on the inputs that the others leave it. None starts anew, on the dense FFNs.
        start: gates to start from on the dense FFNs, by name of their kind; kinds without start anew.

    Returns:
        gates of each kind, by name of their FFN.
    """
    total = training.epochs * len(passes)
    optimise = optax.adam(optax.cosine_decay_schedule(training.learning_rate, total))
    thresholds = {kind: {name: s.threshold for name, s in chosen.items()} for kind, chosen in (running or {}).items()}

    @partial(jax.jit, out_shardings=replicated(mesh_of(ffns_of)))
    def take_step(state, thresholds, ffns_of, batch):
        gates, memory = state
        weights = ffns_of.ffn_weights()

        def selectors(kind):
            return {name: Thresholded(gates[kind][name], threshold) for name, threshold in thresholds[kind].items()}

        traces = {kind: ffns_of.traces(batch, selectors(kind)) for kind in thresholds} or ffns_of.traces(batch, {})

        def loss_of(gates):
            losses = [
                gate_loss(kinds[kind].objective, gate, weights[name], (traces[kind] if thresholds else traces)[name])
                for kind, of_kind in gates.items()
                for name, gate in of_kind.items()
            ]
            return jnp.stack(losses).sum(), jnp.stack(losses).mean()

        (_, loss), gradients = jax.value_and_grad(loss_of, has_aux=True)(gates)
        updates, memory = optimise.update(gradients, memory)
        return (optax.apply_updates(gates, updates), memory), loss

    gates = _initial_gates(ffns_of, kinds, training) | dict(start or {})
    if running is not None:
        gates = {kind: {name: running[kind][name].score for name in gates[kind]} for kind in kinds}
    state, thresholds = replicate_like(ffns_of, ((gates, optimise.init(gates)), thresholds))
    checkpoints = Checkpoints(folder)
    start, state = checkpoints.restore(state) or (0, state)
    if start:
        report(start, jnp.nan)
    for step, batch in enumerate(batches_from(passes, training.epochs, start), start + 1):
        state, loss = take_step(state, thresholds, ffns_of, batch)
        report(step, loss)
        if step % training.checkpoint_steps == 0 or step == total:
            checkpoints.save(step, state)
    checkpoints.close()
    return {kind: {name: state[0][kind][name] for name in gates[kind]} for kind in kinds}


def _initial_gates(ffns_of: HasFFNs, kinds: Mapping[str, GateSpec], training: GateTraining) -> dict[str, Gates]:
    shapes = {name: weights.w_in.shape for name, weights in ffns_of.ffn_weights().items()}
    keys = dict(zip(shapes, jax.random.split(jax.random.key(training.seed), len(shapes)), strict=True))
    return {
        kind_name: {
            name: initial_gate(kind, d_model, group_count(features, training.group_size), keys[name])
            for name, (features, d_model) in shapes.items()
        }
        for kind_name, kind in kinds.items()
    }


def batches_from(passes: BatchSource, epochs: int, start: int) -> Iterator[Any]:
    """The batches of several passes from step `start` on."""
    for epoch in range(start // len(passes), epochs):
        yield from passes.batches(epoch, start % len(passes) if epoch == start // len(passes) else 0)
