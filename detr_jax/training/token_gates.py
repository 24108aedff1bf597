"""Training of token gates on a frozen detector, whose own attention or updates are the labels."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from detr_jax.data.batches import BatchSource
from detr_jax.mesh import mesh_of, on_every_device, replicate_like, sum_shards
from detr_jax.methods.token_gates import TokenGates, TokenScore, most_important, token_loss
from detr_jax.models.encoder_decoder import EncoderDecoder
from detr_jax.training.checkpoints import train_resumably
from detr_jax.training.gates import adam_with_cosine, batches_from


def train_token_score(
    model: EncoderDecoder,
    batches: BatchSource,
    method: TokenGates,
    folder: Path,
    report: Callable[[int, jax.Array | None], None],
    *,
    checkpoint_steps: int = 200,
) -> TokenScore:
    """Trains the scorer of a method, or resumes from the latest checkpoint in `folder`.

    Devices that the model is replicated over share every batch, see `detr_jax.mesh`.

    Args:
        model: the frozen detector.
        batches: of the training images' features.
        method: with a scorer that is trained.
        folder: for checkpoints.
        report: called after every step with the number of steps taken so far and the mean loss; once with None when
            training resumes.
        checkpoint_steps: steps between checkpoints.
    """
    steps = method.epochs * len(batches)
    optimiser = adam_with_cosine(method.learning_rate, steps)
    score = method.init(model.config.d_model)
    state = replicate_like(model, (score, optimiser.init(score)))
    static = {"method": method, "optimiser": optimiser, "mesh": mesh_of(model)}
    trained, _ = train_resumably(
        lambda state, batch, step: _take_step(state, model, batch, **static),
        *(state, partial(batches_from, batches, method.epochs), steps, folder, report),
        checkpoint_steps=checkpoint_steps,
    )
    return trained


@partial(jax.jit, static_argnames=("method", "optimiser", "mesh"))
def _take_step(
    state: Any,
    model: EncoderDecoder,
    batch: Any,
    *,
    method: TokenGates,
    optimiser: optax.GradientTransformation,
    mesh: Mesh | None,
) -> tuple[Any, jax.Array]:
    score, memory = state

    def of_shard(held: Any, features: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        model, score = held
        x, tokens, levels = model.encoder_inputs(features)
        tokens = tokens & features.valid[:, None]
        importance = model.token_importance(features, method.labels)
        wanted = most_important(importance, tokens, method.wanted)
        return tokens.sum(), jax.value_and_grad(token_loss)(score, x, tokens, levels, wanted)

    count, sums = sum_shards(mesh, of_shard)((model, score), batch)
    loss, gradients = jax.tree.map(lambda of_tokens: of_tokens / jnp.maximum(count, 1), sums)
    updates, memory = optimiser.update(gradients, memory, score)
    return on_every_device(((optax.apply_updates(score, updates), memory), loss), mesh)
