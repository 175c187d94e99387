"""What is trained: the dual encoder, and the module that maps a batch to the output of an objective."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modeling_amorlip import AmorLIPModel
from modeling_amorlip.cli_amorlip import UserError
from training.objectives import ContrastiveObjective, ObjectiveOutput


class PairEmbeddings(NamedTuple):
    """What an objective reads of a batch: unit-norm embeddings [N, d], logit scale [] and logit bias [] or None."""

    image_embeds: Tensor
    text_embeds: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None


class EmbeddingGradients(NamedTuple):
    """Gradients of a loss with respect to `PairEmbeddings`; None for a value that gets no gradient here."""

    image_embeds: Tensor
    text_embeds: Tensor
    logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None


class PairEncoder(nn.Module):
    """Encode pixels and tokens to unit-norm embeddings.

    The amortizer of the model takes no part: objectives fit heads of their own on detached embeddings.

    Args:
        model: the model whose towers, projections, logit scale and logit bias are used.
        image_mean: mean of the pixels per channel, in 0 to 1.
        image_std: standard deviation of the pixels per channel.
        freeze: `"vision"`, `"text"` or both, towers that are not trained and stay in evaluation mode.
        patch_dropout: fraction of image patches dropped in training.
        text_groups: number of groups of similar length that texts are encoded in.

    Raises:
        UserError: `patch_dropout` is set, and the image encoder has no class token.
    """

    def __init__(
        self,
        model: AmorLIPModel,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        freeze: Iterable[str] = (),
        patch_dropout: float = 0.0,
        text_groups: int = 1,
    ):
        super().__init__()
        self.model, self.text_groups = model, text_groups
        model.amortizer.requires_grad_(False)
        self.frozen = [{"vision": model.vision_model, "text": model.text_model}[name] for name in freeze]
        for tower in self.frozen:
            tower.requires_grad_(False)
        if patch_dropout:
            drop_patches(model.vision_model, patch_dropout)
        self.mean = nn.Buffer(255 * torch.tensor(image_mean).view(3, 1, 1), persistent=False)
        self.std = nn.Buffer(255 * torch.tensor(image_std).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> PairEncoder:
        """Set the training mode; frozen towers and frozen batch normalizations stay in evaluation mode."""
        super().train(mode)
        for tower in self.frozen:
            tower.eval()
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                module.train(mode and module.weight.requires_grad)
        return self

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, lengths: list[int] | None = None
    ) -> PairEmbeddings:
        """Encode a batch.

        Args:
            pixel_values: uint8 [N, 3, H, W].
            input_ids: int64 [N, L].
            attention_mask: int64 [N, L].
            lengths: tokens that each text needs, for encoding texts in groups of similar length.
        """
        pixels = (pixel_values.float() - self.mean) / self.std
        image_embeds = self.model.get_image_features(pixels).pooler_output
        if lengths is None or self.text_groups == 1:
            text_embeds = self.model.get_text_features(input_ids, attention_mask).pooler_output
        else:
            text_embeds = self._encode_by_length(input_ids, attention_mask, lengths)
        return PairEmbeddings(
            nn.functional.normalize(image_embeds.float(), dim=-1),
            nn.functional.normalize(text_embeds.float(), dim=-1),
            self.model.logit_scale.exp(),
            self.model.logit_bias,
        )

    def _encode_by_length(self, input_ids: Tensor, attention_mask: Tensor, lengths: list[int]) -> Tensor:
        """Return text embeddings [N, d], each group padded to its own longest text, without reading from the device."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        rows, parts = torch.tensor(order, device=input_ids.device), []
        for group in torch.arange(len(order)).tensor_split(self.text_groups):
            if len(group):
                group_rows, longest = rows[group[0] : group[-1] + 1], lengths[order[group[-1]]]
                tokens, mask = input_ids[group_rows, :longest], attention_mask[group_rows, :longest]
                parts.append(self.model.get_text_features(tokens, mask).pooler_output)
        embeds = torch.cat(parts)
        return torch.empty_like(embeds).index_copy(0, rows, embeds)


class EncoderWithObjective(nn.Module):
    """Map a batch to the output of an objective. This module is what is wrapped for distribution.

    The objective is held outside the registered submodules: it optimizes its own parameters, keeps them identical in
    all processes and has a checkpoint entry of its own, so neither DDP nor the optimizer may see them.

    Args:
        encoder: the dual encoder.
        objective: maps embeddings to a loss.
    """

    def __init__(self, encoder: PairEncoder, objective: ContrastiveObjective):
        super().__init__()
        self.encoder = encoder
        self.register_load_state_dict_pre_hook(rename_weights_of_0_1)
        self._unregistered_objective = [objective]
        self.num_objective_calls = 0
        """Number of calls that may have changed the objective's state."""

    @property
    def objective(self) -> ContrastiveObjective:
        return self._unregistered_objective[0]

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        sample_ids: Tensor,
        lengths: list[int] | None = None,
        gradients: EmbeddingGradients | None = None,
    ) -> ObjectiveOutput:
        """Encode a batch and return the objective's output.

        Args:
            pixel_values, input_ids, attention_mask, lengths: see `PairEncoder.forward`.
            sample_ids: int64 [N], index of each pair in the data.
            gradients: gradients of the loss, known from an earlier encoding of this batch. The objective is not called
                then, and the returned loss is a surrogate that has these gradients.
        """
        embeddings = self.encoder(pixel_values, input_ids, attention_mask, lengths)
        if gradients is None:
            return self.compute_objective(embeddings, sample_ids)
        return ObjectiveOutput(surrogate_loss(embeddings, gradients))

    def compute_objective(self, embeddings: PairEmbeddings, sample_ids: Tensor | None = None) -> ObjectiveOutput:
        """Return the objective's output for embeddings, with the logit scale among its metrics.

        Raises no error for non-finite embeddings; the loss is NaN instead.
        """
        self.num_objective_calls += 1
        image_embeds, text_embeds, logit_scale, logit_bias = embeddings
        finite = image_embeds.isfinite().all() & text_embeds.isfinite().all()
        # Zero non-finite embeddings so they cannot corrupt the objective's state, then set the loss to NaN so that
        # every rank skips this step.
        image_embeds, text_embeds = image_embeds.nan_to_num(0, 0, 0), text_embeds.nan_to_num(0, 0, 0)
        output = self.objective(image_embeds, text_embeds, logit_scale, logit_bias, sample_ids)
        loss = output.loss * torch.where(finite, 1.0, float("nan"))
        return ObjectiveOutput(loss, {**output.metrics, "logit_scale": logit_scale.detach()})

    def start_epoch(self, epoch: int, num_epochs: int) -> None:
        """Tell the objective that an epoch (from 0) starts."""
        self.num_objective_calls += 1
        self.objective.on_epoch_start(epoch, num_epochs)


def rename_weights_of_0_1(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Rename the weights of checkpoints from version 0.1, which wrapped the encoder without the objective."""
    old = f"{prefix}model."
    for name in [name for name in state_dict if name.startswith(old)]:
        state_dict[f"{prefix}encoder.model.{name.removeprefix(old)}"] = state_dict.pop(name)


def surrogate_loss(embeddings: PairEmbeddings, gradients: EmbeddingGradients) -> Tensor:
    """Return a scalar whose gradient with respect to the embeddings is the given one."""
    loss = (embeddings.image_embeds * gradients.image_embeds).sum()
    loss = loss + (embeddings.text_embeds * gradients.text_embeds).sum()
    if gradients.logit_scale is not None:
        loss = loss + embeddings.logit_scale * gradients.logit_scale
    if gradients.logit_bias is not None and embeddings.logit_bias is not None:
        loss = loss + embeddings.logit_bias * gradients.logit_bias
    return loss


def list_layers(tower: nn.Module) -> list[nn.Module]:
    """Return the layers of a tower: elements of its module lists that hold parameters, but no further module list."""
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    return [
        element
        for elements in lists
        for element in elements
        if any(True for _ in element.parameters()) and not any(isinstance(m, nn.ModuleList) for m in element.modules())
    ]


def drop_patches(vision_model: nn.Module, fraction: float) -> None:
    """Drop a random fraction of the patches of each image in training (Li et al. 2023, FLIP).

    Raises:
        UserError: the encoder has no `embeddings` module that puts a class token before the patches.
    """
    inner = getattr(vision_model, "vision_model", vision_model)
    embeddings = getattr(inner, "embeddings", None)
    if embeddings is None or not any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token")):
        name = type(inner).__name__
        raise UserError(f"patch_dropout: the image encoder {name} has no class token beside patches; set it to 0.")

    def drop(module: nn.Module, inputs: tuple, embeds: Tensor) -> Tensor:
        if not module.training:
            return embeds
        patches = embeds[:, 1:]
        num_kept = max(1, round(patches.shape[1] * (1 - fraction)))
        kept = torch.rand(patches.shape[:2], device=embeds.device).topk(num_kept).indices
        patches = patches.gather(1, kept[:, :, None].expand(-1, -1, patches.shape[2]))
        return torch.cat([embeds[:, :1], patches], dim=1)

    embeddings.register_forward_hook(drop)
