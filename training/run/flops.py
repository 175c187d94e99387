"""Measure the speed of a run in FLOPs of the encoders, and as a fraction of the device's peak."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modeling_amorlip import AmorLIPModel


PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "V100": 112e12,
    "T4": 65e12,
    "4090": 165e12,
    "3090": 71e12,
}
"""Dense half-precision FLOP/s stated by vendors, by a part of the device's name; the first match counts."""


class FlopMeter:
    """
    Count the FLOPs of training steps.

    An encoder that is trained costs its forward pass once and the backward pass twice (gradients of activations and of
    weights). One whose adapters alone are trained saves the gradients of weights, and a frozen one the backward pass.

    Args:
        model: the model, whose encoders are run once.
        image_size: height and width of the training images.
        context: length of the longest text.
        patch_dropout: fraction of patches that are dropped.
    """

    def __init__(self, model: AmorLIPModel, image_size: int, context: int, patch_dropout: float = 0.0):
        device = model.logit_scale.device
        image = torch.zeros(1, 3, image_size, image_size, device=device, dtype=model.dtype)
        text = torch.zeros(1, context, dtype=torch.long, device=device)
        text[:, -1] = model.config.text_config.eos_token_id or 0
        vision = _count_flops(model, lambda: model.get_image_features(image))
        self.per_image = vision * (1 - patch_dropout) * _count_passes(model.vision_model)
        text_flops = _count_flops(model, lambda: model.get_text_features(text))
        self.per_token = text_flops / context * _count_passes(model.text_model)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = next((peak for part, peak in PEAKS.items() if part in name), None)

    def rates(self, images: int, tokens: int, seconds: float) -> dict[str, float]:
        """Return `tflops_per_second` of one process's step, and `mfu` if the device's peak is known."""
        rate = (images * self.per_image + tokens * self.per_token) / seconds
        return {"tflops_per_second": rate / 1e12} | ({"mfu": rate / self.peak} if self.peak else {})


def _count_passes(encoder: nn.Module) -> int:
    """Return how often the products of an encoder are computed in a step, forward and backward."""
    trained = [parameter.requires_grad for parameter in encoder.parameters()]
    return 1 + any(trained) + all(trained)


@torch.no_grad()
def _count_flops(model: AmorLIPModel, call: Callable[[], object]) -> int:
    was_training = model.training
    model.eval()  # draws no random numbers and updates no running statistics
    with FlopCounterMode(display=False) as counter:
        call()
    model.train(was_training)
    return counter.get_total_flops()
