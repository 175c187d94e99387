"""The model and its processor for a run: continued from a folder or the Hub, or fresh with a tokenizer of its own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from modeling_amorlip import AmorLIPModel
from modeling_amorlip.cli_amorlip import UserError


class PairEncoder(nn.Module):
    """What is wrapped for distribution: pixels and tokens in, unit-norm embeddings and the logit scale out.

    The amortizer stays outside: the objective fits it on detached embeddings with an optimiser of its own.
    """

    def __init__(
        self,
        model: AmorLIPModel,
        image_mean: list[float],
        image_std: list[float],
        freeze: Iterable[str] = (),
        patch_dropout: float = 0.0,
        text_groups: int = 1,
    ):
        super().__init__()
        self.model, self.text_groups = model, text_groups
        model.amortizer.requires_grad_(False)
        self.frozen = [{"vision": model.vision_model, "text": model.text_model}[name] for name in freeze]
        for encoder in self.frozen:
            encoder.requires_grad_(False)
        if patch_dropout:
            _drop_patches(model.vision_model, patch_dropout)
        self.mean = nn.Buffer(255 * torch.tensor(image_mean).view(3, 1, 1), persistent=False)
        self.std = nn.Buffer(255 * torch.tensor(image_std).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> PairEncoder:
        """As any module's, but frozen encoders, and statistics of frozen batch normalisations, stay as they are."""
        super().train(mode)
        for encoder in self.frozen:
            encoder.eval()
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                module.train(mode and module.weight.requires_grad)
        return self

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, lengths: list[int] | None = None
    ):
        """Pixels and tokens to what a loss needs.

        Args:
            pixel_values: uint8 [N, 3, H, W]. input_ids, attention_mask: [N, length].
            lengths: tokens that each text needs, for encoding texts in groups of similar length.

        Returns:
            (image_embeds [N, d], text_embeds [N, d], scale [], bias [] or None).
        """
        pixels = (pixel_values.float() - self.mean) / self.std
        image_embeds = self.model.get_image_features(pixels).pooler_output
        if lengths is None or self.text_groups == 1:
            text_embeds = self.model.get_text_features(input_ids, attention_mask).pooler_output
        else:
            text_embeds = self._encode_by_length(input_ids, attention_mask, lengths)
        return (
            nn.functional.normalize(image_embeds.float(), dim=-1),
            nn.functional.normalize(text_embeds.float(), dim=-1),
            self.model.logit_scale.exp(),
            self.model.logit_bias,
        )

    def _encode_by_length(self, input_ids: Tensor, attention_mask: Tensor, lengths: list[int]) -> Tensor:
        """Text embeddings [N, d], each group padded to its own longest. Nothing is read from the device."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        rows, parts = torch.tensor(order, device=input_ids.device), []
        for group in torch.arange(len(order)).tensor_split(self.text_groups):
            if len(group):
                chosen, longest = rows[group[0] : group[-1] + 1], lengths[order[group[-1]]]
                tokens, mask = input_ids[chosen, :longest], attention_mask[chosen, :longest]
                parts.append(self.model.get_text_features(tokens, mask).pooler_output)
        embeds = torch.cat(parts)
        return torch.empty_like(embeds).index_copy(0, rows, embeds)


def _drop_patches(vision_model: nn.Module, share: float) -> None:
    """Leaves out a random share of patches, others for each image, in training (Li et al. 2023, FLIP).

    Raises:
        UserError: the encoder has no `embeddings` that put a class token before the patches.
    """
    vision_model = getattr(vision_model, "vision_model", vision_model)
    embeddings = getattr(vision_model, "embeddings", None)
    if not any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token")):
        kind = type(vision_model).__name__
        raise UserError(f"patch_dropout: a {kind} has no class token beside patches; set it to 0.")

    def drop(module: nn.Module, inputs, embeds: Tensor) -> Tensor:
        if not module.training:
            return embeds
        patches = embeds[:, 1:]
        kept = max(1, round(patches.shape[1] * (1 - share)))
        chosen = torch.rand(patches.shape[:2], device=embeds.device).topk(kept).indices
        patches = patches.gather(1, chosen[:, :, None].expand(-1, -1, patches.shape[2]))
        return torch.cat([embeds[:, :1], patches], dim=1)

    embeddings.register_forward_hook(drop)
