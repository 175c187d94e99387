"""How fast a run is, and how much of the device that uses: FLOPs of the encoders against the device's peak."""

from __future__ import annotations

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
"""Dense half-precision FLOP/s that vendors state, by a part of the device's name; the first that matches counts."""


class FlopMeter:
    """
    FLOPs of training steps: forward once and backward twice, for gradients by activations and by weights, of each
    encoder that is trained; once where only adapters are; not at all where nothing is.

    Args:
        image_size: of training images. context: longest text.
        patch_dropout: share of patches that are not computed.
    """

    def __init__(self, model: AmorLIPModel, image_size: int, context: int, patch_dropout: float = 0.0):
        device = model.logit_scale.device
        image = torch.zeros(1, 3, image_size, image_size, device=device, dtype=model.dtype)
        text = torch.zeros(1, context, dtype=torch.long, device=device)
        text[:, -1] = model.config.text_config.eos_token_id or 0
        vision = _count(model, lambda: model.get_image_features(image))
        self.per_image = vision * (1 - patch_dropout) * _passes(model.vision_model)
        self.per_token = _count(model, lambda: model.get_text_features(text)) / context * _passes(model.text_model)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = next((peak for part, peak in PEAKS.items() if part in name), None)

    def rates(self, images: int, tokens: int, seconds: float) -> dict[str, float]:
        """{"tflops_per_second", and "mfu" where the device's peak is known} of one process's step."""
        rate = (images * self.per_image + tokens * self.per_token) / seconds
        return {"tflops_per_second": rate / 1e12} | ({"mfu": rate / self.peak} if self.peak else {})


def _passes(encoder: nn.Module) -> int:
    """How often an encoder's products are computed in a step, forward and backward."""
    trained = [parameter.requires_grad for parameter in encoder.parameters()]
    return 1 + any(trained) + all(trained)


@torch.no_grad()
def _count(model: AmorLIPModel, call) -> int:
    was_training = model.training
    model.eval()  # neither draws random numbers nor moves running statistics
    with FlopCounterMode(display=False) as counter:
        call()
    model.train(was_training)
    return counter.get_total_flops()
