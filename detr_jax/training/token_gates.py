"""Training of token gates on a frozen detector, whose own attention or updates are the labels."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from detr_jax.data.batches import BatchSource, ImageBatches
from detr_jax.data.dataset import Dataset
from detr_jax.errors import InputError
from detr_jax.mesh import mesh_of, on_every_device, replicate, replicate_like, sum_shards, to_host
from detr_jax.methods.token_gates import GatedTokens, TokenGates, TokenScore, most_important, token_loss
from detr_jax.models import Detector
from detr_jax.models.encoder_decoder import EncoderDecoder
from detr_jax.training.checkpoints import train_resumably
from detr_jax.training.gates import adam_with_cosine, batches_from


def untrained_gates(model: Detector, method: TokenGates) -> GatedTokens:
    """Token gates before training.

    Raises:
        InputError: if the detector has no encoder of image tokens, or the shares to keep do not fit its layers.
    """
    if not isinstance(model, EncoderDecoder):
        raise InputError(f"a {type(model).__name__} has no encoder whose tokens could be chosen")
    gates = GatedTokens(method.init(model.config.d_model), method.keep)
    gates.counts(1, model.config.encoder_layers)
    return gates


def fit_token_gates(
    model: Detector, data: Dataset, method: TokenGates, batch_size: int, folder: Path, *, progress: bool = True
) -> GatedTokens:
    """Token gates of a frozen detector, trained on images or resumed from the checkpoints in `folder`.

    All devices share every batch. Errors as of `untrained_gates`.
    """
    gates = untrained_gates(model, method)
    if not method.is_trained:
        return gates
    placed = cast(EncoderDecoder, replicate(model))
    batches = ImageBatches(placed, data, batch_size, method.seed)
    with tqdm(total=method.epochs * len(batches), desc="token gates", unit="step", disable=not progress) as bar:

        def show(step: int, loss: jax.Array | None) -> None:
            bar.update(step - bar.n)
            if loss is not None:
                bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)

        score = train_token_score(placed, batches, method, folder, show)
    return replace(gates, score=jax.tree.map(jnp.asarray, to_host(score)))


def training_record(method: TokenGates, data: Dataset) -> dict[str, Any]:
    """Training of token gates, for the record in a plan."""
    return {"token gates": asdict(method) | {"data": data.name, "images": len(data)}}


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
