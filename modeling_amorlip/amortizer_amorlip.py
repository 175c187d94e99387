"""The amortizer: one light head per modality that predicts the log-partition of an embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_amorlip import AmorLIPAmortizerConfig, AmorLIPConfig


class AmorLIPAmortizer(nn.Module):
    """
    One head per modality, which predicts log E[exp(logit)] of an embedding over the other modality (paper Section 3.2).

    The expectation is a mean, so that a prediction does not depend on the number of pairs in a batch; adding the
    logarithm of a count gives the sum over that many pairs. Heads compute in float32, whatever the model was cast to,
    on detached embeddings.
    """

    image_head: AmortizerHead
    text_head: AmortizerHead

    def __init__(self, config: AmorLIPConfig):
        super().__init__()
        head_class = HEADS[config.amortizer_config.head_type]
        self.image_head = head_class(config.projection_dim, config.amortizer_config)
        self.text_head = head_class(config.projection_dim, config.amortizer_config)

    def forward(
        self,
        image_embeds: Tensor | None,
        text_embeds: Tensor | None,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Map [I, d], [T, d], scale [], bias [] to log_partition_per_image [I] and log_partition_per_text [T], float32.

        None stays None. The residual MLP has learned scale and bias with the rest; other heads use the given ones.
        """
        device = next(embeds.device for embeds in (image_embeds, text_embeds) if embeds is not None)
        with torch.autocast(device.type, enabled=False):
            scale = torch.as_tensor(logit_scale, device=device).detach().float()
            bias = 0.0 if logit_bias is None else logit_bias.detach().float()

            def predict(head: AmortizerHead, embeds: Tensor | None) -> Tensor | None:
                return None if embeds is None else head(embeds.detach().float(), scale, bias)

            return predict(self.image_head, image_embeds), predict(self.text_head, text_embeds)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize the heads again. What `observe` has collected stays."""
        self.image_head.reset_parameters()
        self.text_head.reset_parameters()

    @torch.no_grad()
    def start_at(self, targets: list[Tensor], predictions: list[Tensor]) -> None:
        """Move fresh heads to where their targets are; means [] for the image head and the text head."""
        for head, target, prediction in zip((self.image_head, self.text_head), targets, predictions, strict=True):
            head.start_at(target, prediction)

    @property
    def observes(self) -> bool:
        """Whether the heads collect embeddings, so that `observe` has to be called in training."""
        return hasattr(self.image_head, "ring")

    @torch.no_grad()
    def observe(self, image_embeds: Tensor, text_embeds: Tensor) -> None:
        """Give heads that collect embeddings a batch: [N, d] twice."""
        self.image_head.ring.push(text_embeds.detach().float())
        self.text_head.ring.push(image_embeds.detach().float())


class AmortizerHead(nn.Module):
    """A map from embeddings [N, d], logit scale [] and bias [] to log-partitions [N]."""

    ring: EmbeddingRing  # of heads that collect embeddings

    def reset_parameters(self) -> None:
        """Initialize what is learned again."""

    def start_at(self, target: Tensor, prediction: Tensor) -> None:
        """Move a fresh head from its mean prediction [] to its mean target []."""


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, whatever its weights were cast to."""

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs.float(), self.weight.float(), self.bias.float())


class Float32LayerNorm(nn.LayerNorm):
    """A layer norm that computes in float32, whatever its weights were cast to."""

    def forward(self, inputs: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return nn.functional.layer_norm(inputs.float(), self.normalized_shape, weight, bias, self.eps)


class ResidualMLPHead(AmortizerHead):
    """The paper's three-layer residual MLP: [N, d] -> [N]."""

    def __init__(self, embed_dim: int, config: AmorLIPAmortizerConfig):
        super().__init__()
        hidden_dim = max(1, round(config.width_factor * embed_dim))
        self.fc1 = Float32Linear(embed_dim, hidden_dim)
        self.norm1 = Float32LayerNorm(hidden_dim)
        self.fc2 = Float32Linear(hidden_dim, embed_dim)
        self.norm2 = Float32LayerNorm(embed_dim)
        self.out = Float32Linear(embed_dim, 1)

    def forward(self, embeds: Tensor, scale: Tensor, bias: Tensor | float) -> Tensor:
        hidden = self.norm1(torch.relu(self.fc1(embeds)))
        hidden = self.norm2(torch.relu(self.fc2(hidden)))
        return self.out(torch.relu(hidden + embeds)).squeeze(-1)

    def reset_parameters(self) -> None:
        for layer in (self.fc1, self.norm1, self.fc2, self.norm2, self.out):
            layer.reset_parameters()

    def start_at(self, target: Tensor, prediction: Tensor) -> None:
        # A fresh MLP predicts about 0. Taking its mean off too would leave the bias a gradient of 0 but for rounding,
        # which Adam would blow up to full steps of random sign.
        self.out.bias.add_(target)


class EmbeddingRing(nn.Module):
    """The last `size` embeddings of a modality; full after the first batch, with repetitions if it is smaller."""

    embeds: Tensor
    count: Tensor

    def __init__(self, size: int, embed_dim: int):
        super().__init__()
        # Random unit vectors, which the first batch replaces.
        self.register_buffer("embeds", nn.functional.normalize(torch.randn(size, embed_dim), dim=-1))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def push(self, embeds: Tensor) -> None:
        size, number = len(self.embeds), len(embeds)
        slots = torch.arange(size, device=embeds.device)
        # Slot k takes the newest row whose running number is k modulo size; `age` counts back from the batch's end.
        age = (self.count + number - 1 - slots) % size
        replaced = (age < number) | (self.count == 0)
        rows = (number - 1 - age) % number
        self.embeds.copy_(torch.where(replaced[:, None], embeds[rows], self.embeds))
        self.count += number


class QueueHead(AmortizerHead):
    """log mean_q exp(s <x, y_q> + b) over the last embeddings y_q of the other modality; nothing is learned."""

    def __init__(self, embed_dim: int, config: AmorLIPAmortizerConfig):
        super().__init__()
        self.ring = EmbeddingRing(config.size, embed_dim)

    def forward(self, embeds: Tensor, scale: Tensor, bias: Tensor | float) -> Tensor:
        return _log_mean_exp(scale * embeds @ self.ring.embeds.float().T) + bias


class PrototypeHead(AmortizerHead):
    """log mean_m exp(s <x, w_m / |w_m|> + b): the form of the true partition, over learned prototypes w (NeuCLIP)."""

    def __init__(self, embed_dim: int, config: AmorLIPAmortizerConfig):
        super().__init__()
        self.prototypes = nn.Parameter(nn.functional.normalize(torch.randn(config.size, embed_dim), dim=-1))
        self.ring = EmbeddingRing(config.size, embed_dim)

    def forward(self, embeds: Tensor, scale: Tensor, bias: Tensor | float) -> Tensor:
        return _log_mean_exp(scale * embeds @ nn.functional.normalize(self.prototypes.float(), dim=-1).T) + bias

    def reset_parameters(self) -> None:
        """Replace the prototypes by the embeddings seen last."""
        self.prototypes.copy_(self.ring.embeds)


class RandomFeaturesHead(AmortizerHead):
    """
    Linear in positive random features, as Proposition 1 states it: log <phi(x), v>.

    exp(s <x, y>) = E_w[phi_w(x) phi_w(y)] with w ~ N(0, I) and phi_w(x) = exp(sqrt(s) <w, x> - s / 2) on unit vectors,
    so the partition is linear in phi(x), with v = E_y[phi(y)] / size, learned as its logarithm.
    """

    frequencies: Tensor

    def __init__(self, embed_dim: int, config: AmorLIPAmortizerConfig):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(config.size, embed_dim))
        self.log_weights = nn.Parameter(torch.zeros(config.size))

    def forward(self, embeds: Tensor, scale: Tensor, bias: Tensor | float) -> Tensor:
        logits = scale.sqrt() * embeds @ self.frequencies.float().T + self.log_weights.float()
        return _log_mean_exp(logits) - scale / 2 + bias

    def reset_parameters(self) -> None:
        self.log_weights.zero_()

    def start_at(self, target: Tensor, prediction: Tensor) -> None:
        self.log_weights.add_(target - prediction)


def infonce_loss(logits: Tensor, log_partition_per_image: Tensor, log_partition_per_text: Tensor) -> Tensor:
    """
    Return InfoNCE over a batch of pairs, logits [N, N], whose gradient also fits the heads to the batch's partitions.

    The heads' own loss adds nothing to the value, and nothing to the gradient of anything but the heads.
    """
    if logits.shape[0] != logits.shape[1]:
        raise ValueError(f"return_loss needs pairs; there are {logits.shape[0]} images and {logits.shape[1]} texts.")
    labels = torch.arange(len(logits), device=logits.device)
    loss = (nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)) / 2
    for predicted, target in ((log_partition_per_image, logits), (log_partition_per_text, logits.T)):
        if predicted.requires_grad:
            log_mean = target.detach().logsumexp(1) - math.log(len(logits))
            head_loss = nn.functional.smooth_l1_loss(predicted, log_mean.to(predicted.device))
            loss = loss + (head_loss - head_loss.detach()).to(loss.device)
    return loss


@torch.no_grad()
def init_head_weights(module: nn.Module) -> None:
    """Initialize what heads hold beside linear layers and norms, unless a checkpoint has filled it."""
    if isinstance(module, EmbeddingRing):
        init.normal_(module.embeds, std=module.embeds.shape[1] ** -0.5)
        init.zeros_(module.count)
    elif isinstance(module, PrototypeHead):
        init.normal_(module.prototypes, std=module.prototypes.shape[1] ** -0.5)
    elif isinstance(module, RandomFeaturesHead):
        init.normal_(module.frequencies)
        init.zeros_(module.log_weights)


def _log_mean_exp(logits: Tensor) -> Tensor:
    return logits.logsumexp(dim=-1) - math.log(logits.shape[-1])


HEADS = {
    "residual_mlp": ResidualMLPHead,
    "prototype": PrototypeHead,
    "random_features": RandomFeaturesHead,
    "queue": QueueHead,
}
