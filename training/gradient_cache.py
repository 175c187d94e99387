"""Train on large batches with little memory: the loss sees the whole batch, the encoders a part of it at a time.

Gradient caching (Gao et al. 2021, arXiv 2101.06983) encodes every part without a graph, computes the loss of all
embeddings and its gradients, then encodes each part again, with the random numbers that it drew before, and
backpropagates the cached gradients. The result is the gradient of the whole batch, for one more forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.model.encoder import EmbeddingGradients, EncoderWithObjective, PairEmbeddings
from training.objectives import ObjectiveOutput


RandomState = list[Tensor]
"""State of the CPU's generator, and of the current GPU's if there is one."""


def cached_backward(
    accelerator: Accelerator,
    wrapped: nn.Module,
    module: EncoderWithObjective,
    batch: dict[str, Any],
    micro_batch_size: int,
) -> ObjectiveOutput:
    """Add the gradients of the batch to the encoder's parameters and return the objective's output.

    Args:
        accelerator: provides mixed precision and the backward pass.
        wrapped: `module` as it is wrapped for distribution.
        module: the encoder and the objective.
        batch: arguments of `module`, tensors and lists with one row per pair.
        micro_batch_size: pairs encoded at a time.
    """
    num_pairs = len(batch["sample_ids"])
    slices = [slice(start, start + micro_batch_size) for start in range(0, num_pairs, micro_batch_size)]
    parts = [{name: value[part] for name, value in batch.items()} for part in slices]
    embeddings, random_states = _encode_without_graph(accelerator, module, parts)
    with accelerator.autocast():
        output = module.compute_objective(embeddings, batch["sample_ids"])
    output.loss.backward()
    gradients = _split_gradients(embeddings, micro_batch_size)
    for i, (part, part_gradients, random_state) in enumerate(zip(parts, gradients, random_states, strict=True)):
        # Processes exchange gradients once, with the last part.
        is_last = i == len(parts) - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(wrapped):
            with replay_random_state(random_state):
                surrogate = wrapped(**part, gradients=part_gradients)
            accelerator.backward(surrogate.loss)
    return output


def _encode_without_graph(
    accelerator: Accelerator, module: EncoderWithObjective, parts: list[dict[str, Any]]
) -> tuple[PairEmbeddings, list[RandomState]]:
    """Return the embeddings of all parts as leaves of a graph, and the random state before each part."""
    random_states, encoded = [], []
    with torch.no_grad(), accelerator.autocast():
        for part in parts:
            random_states.append(get_random_state())
            encoded.append(module.encoder(**{name: value for name, value in part.items() if name != "sample_ids"}))
    scale, bias = encoded[0].logit_scale, encoded[0].logit_bias
    embeddings = PairEmbeddings(
        torch.cat([part.image_embeds for part in encoded]).requires_grad_(),
        torch.cat([part.text_embeds for part in encoded]).requires_grad_(),
        scale.detach().clone().requires_grad_(),
        None if bias is None else bias.detach().clone().requires_grad_(),
    )
    return embeddings, random_states


def _split_gradients(embeddings: PairEmbeddings, micro_batch_size: int) -> list[EmbeddingGradients]:
    """Return the gradients of each part; those of the logit scale and bias go with the last part."""
    image_gradient, text_gradient = embeddings.image_embeds.grad, embeddings.text_embeds.grad
    assert image_gradient is not None and text_gradient is not None
    pairs = zip(image_gradient.split(micro_batch_size), text_gradient.split(micro_batch_size), strict=True)
    gradients = [EmbeddingGradients(image, text) for image, text in pairs]
    bias_gradient = None if embeddings.logit_bias is None else embeddings.logit_bias.grad
    gradients[-1] = EmbeddingGradients(*gradients[-1][:2], embeddings.logit_scale.grad, bias_gradient)
    return gradients


def get_random_state() -> RandomState:
    """Return the state of torch's generators."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def set_random_state(state: RandomState) -> None:
    """Set the state of torch's generators to what `get_random_state` returned."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])


@contextlib.contextmanager
def replay_random_state(state: RandomState) -> Iterator[None]:
    """Draw the random numbers that followed `state` again; afterwards, also after an error, go on as before."""
    current = get_random_state()
    set_random_state(state)
    try:
        yield
    finally:
        set_random_state(current)
