"""The amortizer: a light head a modality that predicts the log-partition of an embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .configuration_amorlip import AmorLIPAmortizerConfig, AmorLIPConfig


class AmorLIPAmortizer(nn.Module):
    """
    One head a modality, each predicting log E[exp(logit)] of an embedding over the other modality (paper Section 3.2).

    The expectation is a mean, so that a prediction does not depend on how many pairs a batch held; adding the logarithm
    of a count gives the sum over that many pairs. Always computed in float32, always on detached embeddings.
    """

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
        """[I, d], [T, d], scale [], bias [] -> (log_partition_per_image [I], log_partition_per_text [T]), float32.

        None stays None. The residual MLP has learnt scale and bias with the rest; the other heads compute with those
        given.
        """
        device = (text_embeds if image_embeds is None else image_embeds).device
        with torch.autocast(device.type, enabled=False):
            scale = torch.as_tensor(logit_scale, device=device).detach().float()
            bias = 0.0 if logit_bias is None else logit_bias.detach().float()
            return tuple(
                None if embeds is None else head(embeds.detach().float(), scale, bias)
                for head, embeds in ((self.image_head, image_embeds), (self.text_head, text_embeds))
            )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Starts the heads anew. What `observe` has collected stays."""
        self.image_head.reset_parameters()
        self.text_head.reset_parameters()

    @torch.no_grad()
    def start_at(self, targets: list[Tensor], predictions: list[Tensor]) -> None:
        """Moves fresh heads to where their targets are; means [] for the image head and the text head."""
        for head, target, prediction in zip((self.image_head, self.text_head), targets, predictions, strict=True):
            head.start_at(target, prediction)

    @property
    def observes(self) -> bool:
        """Whether the heads collect embeddings, so that `observe` has to be called."""
        return hasattr(self.image_head, "ring")

    @torch.no_grad()
    def observe(self, image_embeds: Tensor, text_embeds: Tensor) -> None:
        """Hands the heads that collect embeddings a batch: [N, d] twice."""
        self.image_head.ring.push(text_embeds.detach().float())
        self.text_head.ring.push(image_embeds.detach().float())


class ResidualMLPHead(nn.Module):
    """The paper's three-layer residual MLP: [N, d] -> [N]."""

    def __init__(self, embed_dim: int, config: AmorLIPAmortizerConfig):
        super().__init__()
        hidden_dim = max(1, round(config.width_factor * embed_dim))
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.out = nn.Linear(embed_dim, 1)

    def forward(self, embeds: Tensor, scale: Tensor, bias: Tensor | float) -> Tensor:
        hidden = self.norm1(torch.relu(self.fc1(embeds)))
        hidden = self.norm2(torch.relu(self.fc2(hidden)))
        return self.out(torch.relu(hidden + embeds)).squeeze(-1)

    def reset_parameters(self) -> None:
        for module in self.children():
            module.reset_parameters()

    def start_at(self, target: Tensor, prediction: Tensor) -> None:
        # A fresh MLP predicts about 0. Taking its mean off too would leave the bias a gradient of 0 but for rounding,
        # which Adam would blow up to full steps of random sign.
        self.out.bias += target


class EmbeddingRing(nn.Module):
    """The last `size` embeddings of a modality; after the first batch it is full, with repetitions if need be."""

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


class QueueHead(nn.Module):
    """log mean_q exp(s <x, y_q> + b) over the last embeddings y_q of the other modality: nothing is learned."""

    def __init__(self, embed_dim: int, config: AmorLIPAmortizerConfig):
        super().__init__()
        self.ring = EmbeddingRing(config.size, embed_dim)

    def forward(self, embeds: Tensor, scale: Tensor, bias: Tensor | float) -> Tensor:
        return _log_mean_exp(scale * embeds @ self.ring.embeds.T) + bias

    def reset_parameters(self) -> None:
        pass

    def start_at(self, target: Tensor, prediction: Tensor) -> None:
        pass


class PrototypeHead(nn.Module):
    """log mean_m exp(s <x, w_m / |w_m|> + b): the form of the true partition, over learned prototypes w (NeuCLIP)."""

    def __init__(self, embed_dim: int, config: AmorLIPAmortizerConfig):
        super().__init__()
        self.prototypes = nn.Parameter(nn.functional.normalize(torch.randn(config.size, embed_dim), dim=-1))
        self.ring = EmbeddingRing(config.size, embed_dim)

    def forward(self, embeds: Tensor, scale: Tensor, bias: Tensor | float) -> Tensor:
        return _log_mean_exp(scale * embeds @ nn.functional.normalize(self.prototypes, dim=-1).T) + bias

    def reset_parameters(self) -> None:
        """Prototypes become the embeddings seen last."""
        self.prototypes.copy_(self.ring.embeds)

    def start_at(self, target: Tensor, prediction: Tensor) -> None:
        pass


class RandomFeaturesHead(nn.Module):
    """
    Linear in positive random features, Proposition 1 to the letter: log <phi(x), v>.

    exp(s <x, y>) = E_w[phi_w(x) phi_w(y)] with w ~ N(0, I) and phi_w(x) = exp(sqrt(s) <w, x> - s / 2) on unit vectors,
    so the partition is linear in phi(x), with v = E_y[phi(y)] / size, learned as its logarithm.
    """

    def __init__(self, embed_dim: int, config: AmorLIPAmortizerConfig):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(config.size, embed_dim))
        self.log_weights = nn.Parameter(torch.zeros(config.size))

    def forward(self, embeds: Tensor, scale: Tensor, bias: Tensor | float) -> Tensor:
        return _log_mean_exp(scale.sqrt() * embeds @ self.frequencies.T + self.log_weights) - scale / 2 + bias

    def reset_parameters(self) -> None:
        self.log_weights.zero_()

    def start_at(self, target: Tensor, prediction: Tensor) -> None:
        self.log_weights += target - prediction


def _log_mean_exp(logits: Tensor) -> Tensor:
    return logits.logsumexp(dim=-1) - math.log(logits.shape[-1])


HEADS = {
    "residual_mlp": ResidualMLPHead,
    "prototype": PrototypeHead,
    "random_features": RandomFeaturesHead,
    "queue": QueueHead,
}

__all__ = ["AmorLIPAmortizer"]
