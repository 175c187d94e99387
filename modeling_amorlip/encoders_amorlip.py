"""The two encoders of a model: built, loaded, and pooled to one vector per image or text."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2TextModel,
    SiglipTextModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_amorlip import AmorLIPConfig
from .resnet_amorlip import AmorLIPResNetModel


# Encoders that AutoModel does not find: ours, since configurations may come from another copy of this code, loaded with
# trust_remote_code, whose classes AutoModel does not know; and SigLIP's texts, which it knows as a part of SigLIP only.
ENCODERS = {
    "amorlip_resnet": AmorLIPResNetModel,
    "siglip_text_model": SiglipTextModel,
    "siglip2_text_model": Siglip2TextModel,
}


class UnusedPooler(nn.Module):
    """The first token, in the place of a pooler that is not used: some encoders call theirs without a question."""

    def forward(self, hidden: Tensor, *args, **kwargs) -> Tensor:
        return hidden[:, 0]


# Parts of the names of parameters that an embedding gives no gradient: choices of what to attend to, and inputs or
# outputs that are not used. DistributedDataParallel would wait for them.
WITHOUT_GRADIENT = re.compile(
    r"contact_head\.|entity_embeddings\.|xpath_unitseq2_embeddings\.|_global\.|\.indexer\.|\.(w2e|e2w|e2e)_query"
)


def build_encoder(config: AmorLIPConfig, side: str) -> PreTrainedModel:
    """Build the `"vision"` or `"text"` encoder of a model with fresh weights, in the default dtype.

    Raises:
        ValueError: the architecture cannot be a tower; the message names it.
    """
    config, pooling = getattr(config, f"{side}_config"), getattr(config, f"{side}_pooling")
    if __name__ == "modeling_amorlip.encoders_amorlip":  # a saved folder's own code builds what was built before
        importlib.import_module("modeling_amorlip.architectures_amorlip").require_encoder(config, side, ENCODERS)
    if getattr(config, "use_cache", False):  # of keys and values for generation, which nothing would read
        config.use_cache = False
    if config.dtype is not None:  # remembered from a checkpoint that the configuration came with
        config.dtype = torch.get_default_dtype()
    model_class = _encoder_class(config)
    build = getattr(model_class, "_from_config", None) or model_class.from_config  # the latter is an Auto class's
    encoder = build(config)
    # DistributedDataParallel waits for every parameter's gradient, and none reaches a pooler that is not used or what
    # masked pretraining puts in the place of patches.
    pooler = getattr(encoder, "pooler", None)
    if pooling != "pooler" and pooler is not None and any(True for _ in pooler.parameters()):
        encoder.pooler = UnusedPooler()
    for name, parameter in encoder.named_parameters():
        if WITHOUT_GRADIENT.search(name):
            parameter.requires_grad_(False)
    for module in encoder.modules():
        if isinstance(token := getattr(module, "mask_token", None), nn.Parameter):
            del module.mask_token
            module.register_buffer("mask_token", token.detach())
    return encoder


def build_projection(config: AmorLIPConfig, side: str) -> nn.Module:
    """Build the map from the encoder's pooled output [N, width] to the shared space [N, d]."""
    size = pooled_size(config, side)
    if getattr(config, f"{side}_projection"):
        return nn.Linear(size, config.projection_dim, bias=False)
    if size != config.projection_dim:
        raise ValueError(
            f"{side}_projection is False, but the {side} encoder gives {size} numbers and projection_dim is "
            f"{config.projection_dim}: make them equal, or let {side}_projection be True."
        )
    return nn.Identity()


def pooled_size(config: AmorLIPConfig, side: str) -> int:
    """Return the width of an encoder's pooled output; hierarchical encoders list one width per stage."""
    config, pooling = getattr(config, f"{side}_config"), getattr(config, f"{side}_pooling")
    if pooling == "pooler" and hasattr(config, "projection_size"):  # SigLIP's texts
        return config.projection_size
    if pooling == "pooler" and config.model_type == "mobilevit":
        return config.neck_hidden_sizes[-1]
    if config.model_type == "embedding_gemma2_text":
        return config.embedding_dim
    if hasattr(config, "hidden_sizes"):
        return config.hidden_sizes[-1]
    if not hasattr(config, "hidden_size"):
        raise ValueError(f"{side}_config ({config.model_type}) has no hidden_size; set it to the pooled width.")
    return config.hidden_size


def load_encoder(source: str | os.PathLike | PreTrainedModel, side: str) -> PreTrainedModel:
    """
    Load a trained `"vision"` or `"text"` encoder in float32 from a folder or a name on the Hub, or take a model. A dual
    encoder such as CLIP gives its tower of that side.
    """
    model: Any = source
    if not isinstance(source, PreTrainedModel):
        model = _encoder_class(AutoConfig.from_pretrained(source)).from_pretrained(source, dtype=torch.float32)
    return getattr(model, f"{side}_model", model)


def copy_weights(source: PreTrainedModel, encoder: PreTrainedModel, side: str) -> None:
    """Copy the weights of an encoder into one that `build_encoder` made; a pooler may stay behind.

    Raises:
        ValueError: the source lacks weights, as a model with a head of its own does.
    """
    missing = encoder.load_state_dict(source.state_dict(), strict=False).missing_keys
    if missing:
        name = type(source).__name__
        raise ValueError(f"{side} is a {name} without the weights {', '.join(missing)}; pass a bare encoder.")


def encode_images(encoder: PreTrainedModel, config: AmorLIPConfig, pixel_values: Tensor, **kwargs):
    """Return the encoder's output for [I, channels, height, width], with `pooler_output` [I, width] pooled."""
    kwargs = _output_options(encoder, config, kwargs)
    outputs = encoder(pixel_values=pixel_values.to(_input_dtype(encoder)), return_dict=True, **kwargs)
    return _with_pooling(outputs, pool(outputs, config.vision_pooling))


def encode_texts(
    encoder: PreTrainedModel,
    config: AmorLIPConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    **kwargs,
) -> BaseModelOutputWithPooling:
    """Return the encoder's output for [T, length], padded on either side, with `pooler_output` [T, width] pooled."""
    kwargs = _output_options(encoder, config, kwargs)
    if attention_mask is not None:
        if (shape := [*attention_mask.shape]) != [*input_ids.shape]:  # rolling would cut the texts
            raise ValueError(f"attention_mask is {shape}, input_ids is {[*input_ids.shape]}: make them equal.")
        attention_mask, input_ids, token_type_ids = pad_right(attention_mask, input_ids, token_type_ids)
    if token_type_ids is not None:
        kwargs["token_type_ids"] = token_type_ids
    outputs = encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
    is_end = input_ids == encoder.config.eos_token_id if config.text_pooling == "eos" else None
    return _with_pooling(outputs, pool(outputs, config.text_pooling, attention_mask, is_end))


def _output_options(encoder: PreTrainedModel, config: AmorLIPConfig, kwargs: dict) -> dict:
    """Fill in the whole model's flags for outputs, and leave out those that the encoder does not know."""
    if kwargs.pop("inputs_embeds", None) is not None:
        raise ValueError("inputs_embeds is not supported: pass input_ids, by which texts are pooled, or pixel_values.")
    flags = {name: kwargs.pop(name, None) for name in ("output_hidden_states", "output_attentions")}
    flags = {name: getattr(config, name) if value is None else value for name, value in flags.items()}
    if not any(flags.values()):
        return kwargs
    known = inspect.signature(encoder.forward).parameters
    has_kwargs = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    return kwargs | {name: value for name, value in flags.items() if value and (has_kwargs or name in known)}


def _input_dtype(encoder: PreTrainedModel) -> torch.dtype:
    """Return the dtype of an encoder's weights, which its pixels must have; processors make float32."""
    if not getattr(encoder, "_is_replica", False):
        return encoder.dtype
    # A replica of DataParallel has no parameters, and keeps its copies of them in a dictionary beside.
    copies = (copy for module in encoder.modules() for copy in vars(module)["_former_parameters"].values())
    return next(copy.dtype for copy in copies if copy.is_floating_point())


def pool(
    outputs: Any, pooling: str | None, attention_mask: Tensor | None = None, is_end: Tensor | None = None
) -> Tensor:
    """
    Pool an encoder's outputs to one vector per sample, [N, width]; `pooling` is as in [`AmorLIPConfig`].

    `last_hidden_state` is [N, length, width], or feature maps [N, width, ...]; `attention_mask` [N, length] has 1 for
    tokens; `is_end` [N, length] is true at ends of text, of which `"eos"` takes the first, or else the last token.

    Raises:
        ValueError: the encoder gives no `pooler_output`, or feature maps where tokens are needed.
    """
    if pooling == "pooler":
        if (pooled := outputs.get("pooler_output")) is None:
            raise ValueError("The encoder gives no pooler_output: set its pooling to 'cls', 'mean', 'eos' or 'last'.")
        return pooled if pooled.ndim == 2 else pooled.flatten(2).mean(-1)  # some pool to [N, C, 1, 1] or [N, C, 2, 2]
    hidden = outputs.last_hidden_state
    if hidden.ndim != 3:
        if pooling == "mean":
            return hidden.flatten(2).mean(-1)
        raise ValueError(f"The encoder gives feature maps, which have no {pooling!r} token: set its pooling to 'mean'.")
    if pooling == "cls":
        return hidden[:, 0]
    if attention_mask is None:
        attention_mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    if pooling == "mean":
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)  # an empty text is 0
    position = (attention_mask * torch.arange(1, hidden.shape[1] + 1, device=hidden.device)).argmax(1)
    if pooling == "eos" and is_end is not None:
        is_end = is_end & (attention_mask != 0)
        position = torch.where(is_end.any(1), is_end.int().argmax(1), position)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), position]


def pad_right(attention_mask: Tensor, *tokens: Tensor | None) -> tuple[Any, ...]:
    """
    Roll the rows of a mask and of what belongs to it, [T, length] each, until padding on the left is on the right.

    Encoders with absolute positions expect it there, and so does CLIP's search for the first end of text where that is
    the padding token too. Rows padded on the right stay as they are.
    """
    length = attention_mask.shape[1]
    start = attention_mask.int().argmax(1, keepdim=True)
    order = torch.arange(length, device=attention_mask.device) + start
    order = torch.where(order < length, order, order - length)  # ONNX export knows no remainder by a dynamic length
    return tuple(None if rows is None else rows.gather(1, order) for rows in (attention_mask, *tokens))


def _with_pooling(outputs: Any, pooled: Tensor) -> BaseModelOutputWithPooling:
    states, attentions = outputs.get("hidden_states"), outputs.get("attentions")
    return BaseModelOutputWithPooling(outputs.last_hidden_state, pooled, states, attentions)


def _encoder_class(config: PreTrainedConfig) -> Any:
    # AutoModelForTextEncoding gives the encoder alone of an encoder-decoder such as T5.
    auto = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
    return ENCODERS.get(config.model_type, auto)
