"""AmorLIP: an image encoder and a text encoder in one embedding space, with heads that know the partition function."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.clip.modeling_clip import CLIPTextModelOutput, CLIPVisionModelOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .amortizer_amorlip import AmorLIPAmortizer, EmbeddingRing, PrototypeHead, RandomFeaturesHead
from .configuration_amorlip import AmorLIPConfig
from .encoders_amorlip import build_encoder, build_projection, encode_images, encode_texts, load_encoder, pooled_size
from .loss_amorlip import log_partitions, positive_logits


@dataclass
class AmorLIPOutput(ModelOutput):
    """
    Output of [`AmorLIPModel`]; I images, T texts, d = `projection_dim`. What needs images is None without them, and so
    for texts.

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
    """Weight initialisation, loading and saving of AmorLIP's models; the encoders initialise themselves."""

    config_class = AmorLIPConfig
    base_model_prefix = "amorlip"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Half precision holds a logit scale to one per cent only, and the heads are tiny: both stay in float32, in bfloat16
    # (strict) and under quantisation too.
    _keep_in_fp32_modules = _keep_in_fp32_modules_strict = ["amortizer", "logit_scale", "logit_bias"]

    @property
    def dtype(self) -> torch.dtype:
        """That of the encoders; parameters that stay in float32 do not count."""
        return next(p.dtype for name, p in self.named_parameters() if "_model." in name and p.is_floating_point())

    @classmethod
    def is_custom_code(cls) -> bool:
        # As Transformers' own do, ours initialise only what no checkpoint has filled. In custom code, which it does not
        # expect that of, Transformers leaves out modules without parameters of their own, such as attention layers.
        return False

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
        elif isinstance(module, AmorLIPPreTrainedModel):
            for name in ("visual_projection", "text_projection"):
                if isinstance(projection := getattr(module, name, None), nn.Linear):
                    init.normal_(projection.weight, std=projection.in_features**-0.5)
            if isinstance(module, AmorLIPModel):
                init.constant_(module.logit_scale, self.config.logit_scale_init_value)
                if module.logit_bias is not None:
                    init.constant_(module.logit_bias, self.config.logit_bias_init_value)

    def save_pretrained(self, *args, **kwargs):
        # register_for_auto_class names a class its own Auto class; the folder's code has those of the others too.
        module = __name__.rpartition(".")[2]
        self.config.auto_map = {auto: f"{module}.{name}" for auto, name in AUTO_CLASSES.items()}
        super().save_pretrained(*args, **kwargs)


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
        self.vision_model = build_encoder(config, "vision")
        self.text_model = build_encoder(config, "text")
        self.visual_projection = build_projection(config, "vision")
        self.text_projection = build_projection(config, "text")
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

    @classmethod
    def from_encoders(
        cls,
        vision: str | os.PathLike | dict | PreTrainedConfig | PreTrainedModel,
        text: str | os.PathLike | dict | PreTrainedConfig | PreTrainedModel,
        *,
        freeze: Iterable[str] = (),
        **config,
    ) -> AmorLIPModel:
        """
        A model of two encoders with their weights; projections, logit scale and amortizer are fresh.

        Args:
            vision, text: a folder or a name on the Hub, whose weights are loaded; a `PreTrainedModel`, whose weights
                are copied; or a configuration, for fresh weights. Of a dual encoder (CLIP, SigLIP) it is the tower.
            freeze: `"vision"`, `"text"` or both: encoders to leave as they are; see `freeze`.
            config: other fields of [`AmorLIPConfig`], among them `vision_pooling` and `text_pooling`, which default to
                what suits the encoders.

        Example:

        ```python
        >>> model = AmorLIPModel.from_encoders("facebook/dinov2-small", "sentence-transformers/all-MiniLM-L6-v2")
        >>> model.config.vision_pooling, model.config.text_pooling
        ('pooler', 'mean')
        ```"""
        encoders = {"vision": vision, "text": text}
        for side, encoder in encoders.items():
            if isinstance(encoder, dict | PreTrainedConfig):
                config[f"{side}_config"] = encoder
            else:
                encoders[side] = load_encoder(encoder, side)
                config[f"{side}_config"] = encoders[side].config
        model = cls(AmorLIPConfig(**config))
        for side, encoder in encoders.items():
            if isinstance(encoder, PreTrainedModel):
                # What is unexpected is a pooler that the model leaves out.
                loaded = model.get_submodule(f"{side}_model").load_state_dict(encoder.state_dict(), strict=False)
                if loaded.missing_keys:
                    name, missing = type(encoder).__name__, ", ".join(loaded.missing_keys)
                    raise ValueError(f"{side} is a {name} without the weights {missing}; hand over a bare encoder.")
        return model.freeze(*freeze)

    def freeze(self, *sides: str) -> AmorLIPModel:
        """Takes the encoders named, `"vision"` or `"text"`, out of training; their projections stay in it."""
        for side in sides:
            if side not in ("vision", "text"):
                raise ValueError(f"There is no encoder {side!r} to freeze; choose 'vision', 'text' or both.")
            self.get_submodule(f"{side}_model").requires_grad_(False)
        return self

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """
        The image encoder's output with `pooler_output` [I, d] projected, not normalised.

        Args:
            pixel_values: [I, channels, height, width] in the size that the encoder was made for.
        """
        outputs = encode_images(self.vision_model, self.config.vision_pooling, pixel_values, **kwargs)
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        The text encoder's output with `pooler_output` [T, d] projected, not normalised.

        Args:
            input_ids: [T, length]. attention_mask: [T, length], 1 for tokens and 0 for padding, which may be on either
                side; the output has it on the right.
        """
        outputs = encode_texts(self.text_model, self.config.text_pooling, input_ids, attention_mask, **kwargs)
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        return_loss: bool = False,
        **kwargs,
    ) -> AmorLIPOutput:
        """
        Embeds I images and T texts and scores every pair; with only images, or only texts, embeds these.

        Args:
            input_ids, attention_mask, token_type_ids: [T, length]. pixel_values: [I, channels, height, width].
            return_loss: also return InfoNCE over the batch; needs I = T, pairs in the same order.
        """
        given = {"input_ids": input_ids, "pixel_values": pixel_values}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == 2 or missing and return_loss:
            needs = "A loss needs images and texts" if return_loss else "There is nothing to embed"
            raise ValueError(f"{needs}: {' and '.join(missing)} is None.")
        vision_outputs = text_outputs = image_embeds = text_embeds = logits_per_image = loss = None
        if pixel_values is not None:
            vision_outputs = self.get_image_features(pixel_values, return_dict=True, **kwargs)
            image_embeds = nn.functional.normalize(vision_outputs.pooler_output, dim=-1)
        if input_ids is not None:
            tokens = dict(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
            text_outputs = self.get_text_features(**tokens, return_dict=True, **kwargs)
            text_embeds = nn.functional.normalize(text_outputs.pooler_output, dim=-1)
        scale, bias = self.logit_scale.exp(), self.logit_bias
        log_partition_per_image, log_partition_per_text = self.amortizer(image_embeds, text_embeds, scale, bias)
        if not missing:
            logits_per_image = scale * image_embeds.float() @ text_embeds.float().T.to(image_embeds.device)
            if bias is not None:
                logits_per_image = logits_per_image + bias
        if return_loss:
            pair = dict(image_embeds=image_embeds, text_embeds=text_embeds, logit_scale=scale, logit_bias=bias)
            log_z_image, log_z_text = log_partitions(**pair, positive_weight=1.0)
            loss = ((log_z_image + log_z_text) / 2 - positive_logits(**pair)).mean()
        return AmorLIPOutput(
            loss=loss,
            logits_per_image=logits_per_image,
            logits_per_text=None if missing else logits_per_image.T,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            log_partition_per_image=log_partition_per_image,
            log_partition_per_text=log_partition_per_text,
            vision_model_output=vision_outputs,
            text_model_output=text_outputs,
        )

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


class AmorLIPVisionModelWithProjection(AmorLIPPreTrainedModel):
    """An [`AmorLIPModel`]'s images alone, loaded from the same folder: half the memory."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = ["text_model", "text_projection", "logit_", "amortizer"]

    def __init__(self, config: AmorLIPConfig):
        super().__init__(config)
        self.vision_model = build_encoder(config, "vision")
        self.visual_projection = build_projection(config, "vision")
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, **kwargs) -> CLIPVisionModelOutput:
        """[I, channels, height, width] -> `image_embeds` [I, d], not normalised, with the encoder's output."""
        outputs = encode_images(self.vision_model, self.config.vision_pooling, pixel_values, **kwargs)
        return CLIPVisionModelOutput(
            image_embeds=self.visual_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class AmorLIPTextModelWithProjection(AmorLIPPreTrainedModel):
    """An [`AmorLIPModel`]'s texts alone, loaded from the same folder: half the memory."""

    input_modalities = ("text",)
    _keys_to_ignore_on_load_unexpected = ["vision_model", "visual_projection", "logit_", "amortizer"]

    def __init__(self, config: AmorLIPConfig):
        super().__init__(config)
        self.text_model = build_encoder(config, "text")
        self.text_projection = build_projection(config, "text")
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs) -> CLIPTextModelOutput:
        """[T, length] twice -> `text_embeds` [T, d], not normalised, with the encoder's output."""
        outputs = encode_texts(self.text_model, self.config.text_pooling, input_ids, attention_mask, **kwargs)
        return CLIPTextModelOutput(
            text_embeds=self.text_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class AmorLIPForImageClassification(AmorLIPPreTrainedModel):
    """
    The image encoder under a linear classifier, for fine-tuning: loads an [`AmorLIPModel`]'s folder or its own.

    Example:

    ```python
    >>> model = AutoModelForImageClassification.from_pretrained("outputs/emoji_demo", num_labels=10)
    >>> model(pixel_values, labels=labels).loss.backward()
    ```"""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = ["text_model", "_projection", "logit_", "amortizer"]

    def __init__(self, config: AmorLIPConfig):
        super().__init__(config)
        self.vision_model = build_encoder(config, "vision")
        self.classifier = nn.Linear(pooled_size(config, "vision"), config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs) -> ImageClassifierOutput:
        """
        Args:
            pixel_values: [I, channels, height, width].
            labels: [I] class numbers; [I, num_labels] of 0 and 1 or values as `config.problem_type` says.
        """
        outputs = encode_images(self.vision_model, self.config.vision_pooling, pixel_values, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


AUTO_CLASSES = {
    "AutoModel": "AmorLIPModel",
    "AutoModelForZeroShotImageClassification": "AmorLIPModel",
    "AutoModelForImageClassification": "AmorLIPForImageClassification",
}

__all__ = [
    "AmorLIPAmortizer",
    "AmorLIPForImageClassification",
    "AmorLIPModel",
    "AmorLIPOutput",
    "AmorLIPPreTrainedModel",
    "AmorLIPTextModelWithProjection",
    "AmorLIPVisionModelWithProjection",
]
