"""AmorLIP: an image encoder and a text encoder in one embedding space, with heads that know the partition function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2TextConfig,
    Siglip2TextModel,
    SiglipTextConfig,
    SiglipTextModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .amortizer_amorlip import AmorLIPAmortizer, EmbeddingRing, PrototypeHead, RandomFeaturesHead
from .configuration_amorlip import AmorLIPConfig
from .loss_amorlip import log_partitions, positive_logits
from .resnet_amorlip import AmorLIPResNetModel


# Towers that Transformers itself builds only inside of their dual encoders.
AutoModel.register(SiglipTextConfig, SiglipTextModel, exist_ok=True)
AutoModel.register(Siglip2TextConfig, Siglip2TextModel, exist_ok=True)


@dataclass
class AmorLIPOutput(ModelOutput):
    """
    Output of [`AmorLIPModel`]; I images, T texts, d = `projection_dim`.

    Args:
        loss ([], with `return_loss=True`): InfoNCE over the batch, as in Transformers' CLIP.
        logits_per_image ([I, T], float32): logit_scale * <image, text> + logit_bias.
        logits_per_text ([T, I], float32): its transpose.
        image_embeds ([I, d]), text_embeds ([T, d]): unit-norm embeddings.
        log_partition_per_image ([I], float32): the amortizer's estimate of log E_text[exp(logit)], nats.
        log_partition_per_text ([T], float32): the same over images.
        vision_model_output, text_model_output: the encoders' outputs, `pooler_output` being the projected embedding.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    log_partition_per_image: Tensor | None = None
    log_partition_per_text: Tensor | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    text_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any]:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class AmorLIPPreTrainedModel(PreTrainedModel):
    """Weight initialisation and loading common to AmorLIP's models; the encoders initialise themselves."""

    config_class = AmorLIPConfig
    base_model_prefix = "amorlip"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Half precision holds a logit scale to one per cent only, and the heads are tiny: both stay in float32.
    _keep_in_fp32_modules_strict = ["amortizer", "logit_scale", "logit_bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Leaves come before the module that holds them: first every linear layer (the heads keep this, PyTorch's own
        # default), then the projections over it.
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, EmbeddingRing):
            init.normal_(module.embeds, std=module.embeds.shape[1] ** -0.5)
            init.zeros_(module.count)
        elif isinstance(module, PrototypeHead):
            init.normal_(module.prototypes, std=module.prototypes.shape[1] ** -0.5)
        elif isinstance(module, RandomFeaturesHead):
            init.normal_(module.frequencies)
            init.zeros_(module.log_weights)
        elif isinstance(module, AmorLIPModel):
            for projection in (module.visual_projection, module.text_projection):
                if isinstance(projection, nn.Linear):
                    init.normal_(projection.weight, std=projection.in_features**-0.5)
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if module.logit_bias is not None:
                init.constant_(module.logit_bias, self.config.logit_bias_init_value)


class AmorLIPModel(AmorLIPPreTrainedModel):
    """
    A CLIP-style dual encoder with amortized log-partitions.

    Example:

    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> import modeling_amorlip  # registers the model with the Auto classes

    >>> model = AutoModel.from_pretrained("outputs/emoji_demo")
    >>> processor = AutoProcessor.from_pretrained("outputs/emoji_demo")
    >>> inputs = processor(images=image, text=["a cat", "a dog"], padding=True, return_tensors="pt")
    >>> outputs = model(**inputs)
    >>> outputs.logits_per_image.softmax(-1)
    ```"""

    def __init__(self, config: AmorLIPConfig):
        super().__init__(config)
        self.vision_model = _vision_encoder(config.vision_config)
        self.text_model = AutoModel.from_config(config.text_config)
        self.visual_projection = _projection(config, "vision", _embedding_size(config.vision_config))
        self.text_projection = _projection(config, "text", _embedding_size(config.text_config))
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.logit_bias = None
        if config.logit_bias_init_value is not None:
            self.logit_bias = nn.Parameter(torch.tensor(float(config.logit_bias_init_value)))
        self.amortizer = AmorLIPAmortizer(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """
        The image encoder's output with `pooler_output` [I, d] projected, not normalised.

        Args:
            pixel_values: [I, channels, height, width] in the size that the encoder was made for.
        """
        pixel_values = pixel_values.to(self.vision_model.dtype)  # processors make float32
        return _project(self.vision_model(pixel_values=pixel_values, **kwargs), self.visual_projection)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        The text encoder's output with `pooler_output` [T, d] projected, not normalised.

        Args:
            input_ids: [T, length]. attention_mask: [T, length], 1 for tokens and 0 for padding.
        """
        outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        return _project(outputs, self.text_projection)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool = False,
        return_dict: bool | None = None,
        **kwargs,
    ) -> AmorLIPOutput | tuple:
        """
        Embeds I images and T texts and scores every pair.

        Args:
            input_ids, attention_mask: [T, length]. pixel_values: [I, channels, height, width].
            return_loss: also return InfoNCE over the batch; needs I = T, pairs in the same order.
        """
        if input_ids is None or pixel_values is None:
            missing = "input_ids" if input_ids is None else "pixel_values"
            raise ValueError(
                f"forward needs images and texts, and {missing} is None; "
                "use get_image_features or get_text_features to encode one of them."
            )
        vision_outputs = self.get_image_features(pixel_values, **kwargs)
        text_outputs = self.get_text_features(input_ids, attention_mask, **kwargs)
        image_embeds = nn.functional.normalize(vision_outputs.pooler_output, dim=-1)
        text_embeds = nn.functional.normalize(text_outputs.pooler_output, dim=-1)
        scale, bias = self.logit_scale.exp(), self.logit_bias
        logits_per_image = scale * image_embeds.float() @ text_embeds.float().T.to(image_embeds.device)
        if bias is not None:
            logits_per_image = logits_per_image + bias
        log_partition_per_image, log_partition_per_text = self.amortizer(image_embeds, text_embeds, scale, bias)

        loss = None
        if return_loss:
            pair = dict(image_embeds=image_embeds, text_embeds=text_embeds, logit_scale=scale, logit_bias=bias)
            log_z_image, log_z_text = log_partitions(**pair, positive_weight=1.0)
            loss = ((log_z_image + log_z_text) / 2 - positive_logits(**pair)).mean()
        outputs = AmorLIPOutput(
            loss=loss,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.T,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            log_partition_per_image=log_partition_per_image,
            log_partition_per_text=log_partition_per_text,
            vision_model_output=vision_outputs,
            text_model_output=text_outputs,
        )
        return outputs.to_tuple() if return_dict is False else outputs

    def save_pretrained(self, *args, **kwargs):
        # One class serves two Auto classes, of which register_for_auto_class can name but one.
        name = f"{__name__.rpartition('.')[2]}.{type(self).__name__}"
        self.config.auto_map = {"AutoModelForZeroShotImageClassification": name}
        super().save_pretrained(*args, **kwargs)

    @staticmethod
    def log_prob_per_image(outputs: AmorLIPOutput) -> Tensor:
        """
        log P(text | image) / P(text) = l_ij - log lambda_i as [I, T] nats: scores that are comparable between images.

        A positive value says that the pair is likelier than chance, whatever other candidates there are.
        """
        return outputs.logits_per_image - outputs.log_partition_per_image[:, None]

    @staticmethod
    def log_prob_per_text(outputs: AmorLIPOutput) -> Tensor:
        """log P(image | text) / P(image) as [T, I] nats; see `log_prob_per_image`."""
        return outputs.logits_per_text - outputs.log_partition_per_text[:, None]


def _vision_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    # By name: under trust_remote_code, configuration and model come from two copies of the configuration's module.
    if config.model_type == AmorLIPResNetModel.config_class.model_type:
        return AmorLIPResNetModel._from_config(config)
    return AutoModel.from_config(config)


def _projection(config: AmorLIPConfig, side: str, size: int) -> nn.Module:
    if getattr(config, f"{side}_projection"):
        return nn.Linear(size, config.projection_dim, bias=False)
    if size != config.projection_dim:
        raise ValueError(
            f"{side}_projection is False, but the {side} encoder gives {size} numbers and projection_dim is "
            f"{config.projection_dim}: make them equal, or let {side}_projection be True."
        )
    return nn.Identity()


def _embedding_size(config) -> int:
    """Width of an encoder's pooled output; hierarchical encoders list a width a stage."""
    if hasattr(config, "projection_size"):  # SigLIP's texts
        return config.projection_size
    return config.hidden_sizes[-1] if hasattr(config, "hidden_sizes") else config.hidden_size


def _project(outputs: BaseModelOutputWithPooling, projection: nn.Module) -> BaseModelOutputWithPooling:
    outputs.pooler_output = projection(outputs.pooler_output.flatten(1))  # flatten: some encoders pool to [N, C, 1, 1]
    return outputs


__all__ = ["AmorLIPAmortizer", "AmorLIPModel", "AmorLIPOutput", "AmorLIPPreTrainedModel"]
