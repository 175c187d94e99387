"""Large batches on small memory: the loss sees the whole batch, the encoders a part of it at a time.

Gradient caching (Gao et al. 2021): encode every part without a graph; take the loss of all embeddings and its gradients
by them; encode each part again, with the random numbers it drew before, and send the stored gradients back through it.
The result is the whole batch's gradient, for one more forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.objectives import ObjectiveOutput


def cached_backward(
    accelerator: Accelerator,
    encoder: nn.Module,
    objective: Callable[..., ObjectiveOutput],
    batch: dict[str, Tensor | list],
    sample_ids: Tensor,
    micro_batch_size: int,
) -> tuple[ObjectiveOutput, Tensor]:
    """Adds the batch's gradients to the encoder's parameters; returns (the objective's output, logit scale [])."""
    number = -(-len(sample_ids) // micro_batch_size)
    slices = [slice(i * micro_batch_size, (i + 1) * micro_batch_size) for i in range(number)]
    parts = [{name: value[part] for name, value in batch.items()} for part in slices]
    random_states, encoded = [], []
    with torch.no_grad():
        for part in parts:
            random_states.append(_random_state())
            encoded.append(encoder(**part))
    images, texts = (torch.cat([e[k] for e in encoded]).requires_grad_() for k in (0, 1))
    scale, bias = (None if value is None else value.detach().clone().requires_grad_() for value in encoded[0][2:])
    output = objective(images, texts, scale, bias, sample_ids)
    output.loss.backward()

    image_grads, text_grads = images.grad.split(micro_batch_size), texts.grad.split(micro_batch_size)
    for i, part in enumerate(parts):
        last = i == number - 1
        # Processes exchange gradients once, with the last part; the scale's and the bias's travel with it.
        with contextlib.nullcontext() if last else accelerator.no_sync(encoder):
            with _replayed(random_states[i]):
                image_embeds, text_embeds, part_scale, part_bias = encoder(**part)
            surrogate = (image_embeds * image_grads[i]).sum() + (text_embeds * text_grads[i]).sum()
            if last:
                surrogate = surrogate + part_scale * scale.grad
                if bias is not None and bias.grad is not None:
                    surrogate = surrogate + part_bias * bias.grad
            accelerator.backward(surrogate)
    return output, scale.detach()


def _random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


@contextlib.contextmanager
def _replayed(state: list[Tensor]):
    """Draws the random numbers that followed `state`, then goes on where the generators were."""
    now = _random_state()
    _restore(state)
    yield
    _restore(now)


def _restore(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])
