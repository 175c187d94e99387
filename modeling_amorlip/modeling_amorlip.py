"""AmorLIP: an image encoder and a text encoder in one embedding space, with heads that predict log-partitions."""

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

from .amortizer_amorlip import AmorLIPAmortizer, infonce_loss, init_head_weights
from .configuration_amorlip import AmorLIPConfig
from .encoders_amorlip import (
    build_encoder,
    build_projection,
    copy_weights,
    encode_images,
    encode_texts,
    load_encoder,
    pooled_size,
)


Encoder = str | os.PathLike | dict | PreTrainedConfig | PreTrainedModel


@dataclass
class AmorLIPOutput(ModelOutput):
    """
    Output of [`AmorLIPModel`] for I images and T texts, d being `projection_dim`. What needs images is None without
    them, and likewise for texts. Log-partitions are the amortizer's estimates of log E[exp(logit)] in nats, over texts
    for an image and over images for a text. The encoders' outputs have the projected embedding as `pooler_output`.
    """

    loss: Tensor | None = None  # [], float32: with `return_loss=True` InfoNCE over the batch, as in Transformers' CLIP
    logits_per_image: Tensor | None = None  # [I, T], float32: logit_scale * <image, text> + logit_bias
    logits_per_text: Tensor | None = None  # [T, I], its transpose
    image_embeds: Tensor | None = None  # [I, d], unit norm
    text_embeds: Tensor | None = None  # [T, d], unit norm
    log_partition_per_image: Tensor | None = None  # [I], float32
    log_partition_per_text: Tensor | None = None  # [T], float32
    vision_model_output: BaseModelOutputWithPooling | None = None
    text_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class AmorLIPPreTrainedModel(PreTrainedModel):
    """Weight initialization, loading and saving of AmorLIP's models; the encoders initialize themselves."""

    config: AmorLIPConfig
    config_class = AmorLIPConfig
    base_model_prefix = "amorlip"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    # The losses are means over a batch, which Trainer has to divide by its number of accumulation steps.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the encoders; parameters that stay in float32 do not count."""
        dtypes = (p.dtype for name, p in self.named_parameters() if "_model." in name and p.is_floating_point())
        return next(dtypes, torch.get_default_dtype())

    @classmethod
    def is_custom_code(cls) -> bool:
        # Like Transformers' own models, ours initialize only what no checkpoint has filled. From custom code
        # Transformers does not expect that, and skips modules without parameters of their own, such as attention.
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Children come before the module that holds them: linear layers first get PyTorch's default, which the heads
        # keep, and projections are then initialized over it.
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, AmorLIPPreTrainedModel):
            for name in ("visual_projection", "text_projection"):
                if isinstance(projection := getattr(module, name, None), nn.Linear):
                    init.normal_(projection.weight, std=projection.in_features**-0.5)
            if isinstance(module, AmorLIPModel):
                init.constant_(module.logit_scale, self.config.logit_scale_init_value)
                if module.logit_bias is not None:
                    init.constant_(module.logit_bias, self.config.logit_bias_init_value or 0.0)
        else:
            init_head_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self._embedding_encoder().get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self._embedding_encoder().set_input_embeddings(value)

    def _embedding_encoder(self) -> Any:
        return self.text_model if hasattr(self, "text_model") else self.vision_model

    def save_pretrained(self, *args, **kwargs):
        # Whoever loads the folder with an Auto class and without this package gets what the package would give.
        module = __name__.rpartition(".")[2]
        # A class that was derived in a script or notebook is not in the code that is saved; the one it derives from is.
        saved_class = next(base.__name__ for base in type(self).__mro__ if base.__module__ == __name__)
        auto_classes = AUTO_CLASSES | {"AutoModel": saved_class}
        self.config.auto_map = {auto: f"{module}.{name}" for auto, name in auto_classes.items()}
        super().save_pretrained(*args, **kwargs)


class AmorLIPModel(AmorLIPPreTrainedModel):
    """A CLIP-style dual encoder with amortized log-partitions, called as Transformers' CLIP is."""

    # Half precision holds a logit scale to one per cent only, and the heads are tiny: both are loaded in float32, in
    # bfloat16 too (strict). Quantization spares what the other list names, which must not share an entry.
    _keep_in_fp32_modules = ["amortizer"]
    _keep_in_fp32_modules_strict = ["amortizer.(?:image|text)_head", "logit_(?:scale|bias)"]

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

    @classmethod
    def from_encoders(cls, vision: Encoder, text: Encoder, *, freeze: Iterable[str] = (), **config) -> AmorLIPModel:
        """
        Build a model of two encoders with their weights; projections, logit scale and amortizer are fresh.

        Args:
            vision, text: a folder or a name on the Hub, whose weights are loaded; a `PreTrainedModel`, whose weights
                are copied; or a configuration, for fresh weights. A dual encoder (CLIP, SigLIP) gives its tower.
            freeze: encoders to exclude from training, see `freeze`. config: other fields of [`AmorLIPConfig`].
        """
        encoders = {}
        for side, source in (("vision", vision), ("text", text)):
            if not isinstance(source, dict | PreTrainedConfig):
                encoders[side] = source = load_encoder(source, side)
            config[f"{side}_config"] = getattr(source, "config", source)
        model = cls(AmorLIPConfig(**config))
        for side, encoder in encoders.items():
            copy_weights(encoder, getattr(model, f"{side}_model"), side)
        return model.freeze(*freeze)

    def freeze(self, *sides: str) -> AmorLIPModel:
        """Exclude the named encoders, `"vision"` or `"text"`, from training; their projections stay in it."""
        for side in sides:
            if side not in ("vision", "text"):
                raise ValueError(f"There is no encoder {side!r} to freeze; choose 'vision', 'text' or both.")
            self.get_submodule(f"{side}_model").requires_grad_(False)
        return self

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """
        Return the image encoder's output for [I, channels, height, width], `pooler_output` [I, d] being projected, not
        normalized. Images have the size that the encoder was made for.
        """
        outputs = encode_images(self.vision_model, self.config, pixel_values, **kwargs)
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Return the text encoder's output for [T, length] twice, `pooler_output` [T, d] being projected, not normalized.
        The mask has 1 for tokens and 0 for padding, which may be on either side; the output has it on the right.
        """
        outputs = encode_texts(self.text_model, self.config, input_ids, attention_mask, **kwargs)
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs,
    ) -> AmorLIPOutput:
        """
        Embed I images and T texts and score every pair; with only images, or only texts, embed these.

        Args:
            input_ids, attention_mask, token_type_ids: [T, length]. pixel_values: [I, channels, height, width].
            return_loss: also return InfoNCE over the batch; needs I = T, pairs in the same order.
        """
        _check_inputs(input_ids, pixel_values, return_loss)
        vision_outputs = text_outputs = image_embeds = text_embeds = logits = loss = None
        if pixel_values is not None:
            vision_outputs = self.get_image_features(pixel_values, return_dict=True, **kwargs)
            image_embeds = nn.functional.normalize(vision_outputs.pooler_output, dim=-1)
        if input_ids is not None:
            tokens = dict(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
            text_outputs = self.get_text_features(**tokens, return_dict=True, **kwargs)
            text_embeds = nn.functional.normalize(text_outputs.pooler_output, dim=-1)
        # In float32, whatever the encoders compute in: at a scale of 100 bfloat16 would be off by 0.1 and more.
        with torch.autocast(self.logit_scale.device.type, enabled=False):
            scale, bias = self.logit_scale.float().exp(), None if self.logit_bias is None else self.logit_bias.float()
            log_partitions = self.amortizer(image_embeds, text_embeds, scale, bias)
            if image_embeds is not None and text_embeds is not None:
                logits = scale * image_embeds.float() @ text_embeds.float().T.to(image_embeds.device)
                logits = logits if bias is None else logits + bias
                loss = infonce_loss(logits, *log_partitions) if return_loss else None
        return AmorLIPOutput(
            loss=loss,
            logits_per_image=logits,
            logits_per_text=None if logits is None else logits.T,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            log_partition_per_image=log_partitions[0],
            log_partition_per_text=log_partitions[1],
            vision_model_output=vision_outputs,
            text_model_output=text_outputs,
        )

    @staticmethod
    def log_prob_per_image(outputs: AmorLIPOutput) -> Tensor:
        """
        Return log P(text | image) / P(text) = l_ij - log lambda_i as [I, T] nats, comparable between images: a positive
        value says that the pair is likelier than chance, whatever other candidates there are.
        """
        return outputs["logits_per_image"] - outputs["log_partition_per_image"][:, None]

    @staticmethod
    def log_prob_per_text(outputs: AmorLIPOutput) -> Tensor:
        """Return log P(image | text) / P(image) as [T, I] nats; see `log_prob_per_image`."""
        return outputs["logits_per_text"] - outputs["log_partition_per_text"][:, None]


def _check_inputs(input_ids: Tensor | None, pixel_values: Tensor | None, return_loss: bool | None) -> None:
    given = {"input_ids": input_ids, "pixel_values": pixel_values}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 2 or missing and return_loss:
        needs = "A loss needs images and texts" if return_loss else "There is nothing to embed"
        raise ValueError(f"{needs}: {' and '.join(missing)} is None.")


class AmorLIPVisionModelWithProjection(AmorLIPPreTrainedModel):
    """The images' half of an [`AmorLIPModel`], loaded from the same folder: half the memory."""

    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _keys_to_ignore_on_load_unexpected = ["text_model", "text_projection", "logit_", "amortizer"]

    def __init__(self, config: AmorLIPConfig):
        super().__init__(config)
        self.vision_model = build_encoder(config, "vision")
        self.visual_projection = build_projection(config, "vision")
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, **kwargs) -> CLIPVisionModelOutput:
        """Map [I, channels, height, width] to `image_embeds` [I, d], not normalized, with the encoder's output."""
        outputs = encode_images(self.vision_model, self.config, pixel_values, **kwargs)
        image_embeds = self.visual_projection(outputs.pooler_output)
        return CLIPVisionModelOutput(image_embeds, outputs.last_hidden_state, outputs.hidden_states, outputs.attentions)


class AmorLIPTextModelWithProjection(AmorLIPPreTrainedModel):
    """The texts' half of an [`AmorLIPModel`], loaded from the same folder: half the memory."""

    input_modalities = ["text"]
    _keys_to_ignore_on_load_unexpected = ["vision_model", "visual_projection", "logit_", "amortizer"]

    def __init__(self, config: AmorLIPConfig):
        super().__init__(config)
        self.text_model = build_encoder(config, "text")
        self.text_projection = build_projection(config, "text")
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs) -> CLIPTextModelOutput:
        """Map [T, length] twice to `text_embeds` [T, d], not normalized, with the encoder's output."""
        outputs = encode_texts(self.text_model, self.config, input_ids, attention_mask, **kwargs)
        text_embeds = self.text_projection(outputs.pooler_output)
        return CLIPTextModelOutput(text_embeds, outputs.last_hidden_state, outputs.hidden_states, outputs.attentions)


class AmorLIPForImageClassification(AmorLIPPreTrainedModel):
    """The image encoder under a linear classifier; loads from an [`AmorLIPModel`]'s folder or its own."""

    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _keys_to_ignore_on_load_unexpected = ["text_model", "_projection", "logit_", "amortizer"]

    def __init__(self, config: AmorLIPConfig):
        super().__init__(config)
        self.vision_model = build_encoder(config, "vision")
        self.classifier = nn.Linear(pooled_size(config, "vision"), config.num_labels or 0)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs) -> ImageClassifierOutput:
        """
        Map [I, channels, height, width] to logits [I, num_labels]. Labels are class numbers [I], or [I, num_labels] of
        0 and 1 or of values, as `config.problem_type` says.
        """
        outputs = encode_images(self.vision_model, self.config, pixel_values, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


# What each Auto class loads from a saved folder, but for AutoModel, which loads the class that was saved.
AUTO_CLASSES = {
    "AutoModelForZeroShotImageClassification": "AmorLIPModel",
    "AutoModelForImageClassification": "AmorLIPForImageClassification",
}
