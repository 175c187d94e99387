"""Which encoders of Transformers can be towers, told from their classes or, where that says nothing, by name."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING, PreTrainedConfig


INPUTS = {"vision": "pixel_values", "text": "input_ids"}
# What encoders of each side declare to take; a class that declares nothing inherits "text", whatever it takes.
MODALITIES = {"vision": ({"image"}, {"image", "video"}, {"text"}), "text": ({"text"},)}
# Architectures that build and then fail, or mean something else than an image's or a text's embedding.
REASONS = {
    "returns objects or regions, not an embedding": (
        "conditional_detr d_fine dab-detr deformable_detr deimv2 detr lw_detr mask2former maskformer pp_doclayout_v3 "
        "pp_doclayout_v4 rf_detr rt_detr rt_detr_v2 sam2_hiera_det_model sam2_vision_model sam_hq_vision_model "
        "sam_vision_model edgetam_vision_model table-transformer"
    ),
    "takes several images at once": "efficientloftr lightglue seggpt timesformer",
    "takes images in a form of its own": "minicpm_ocr_vision minicpmv4_7_vision pixtral",
    "reads lines or pages of text": (
        "mgp-str pp_ocrv5_mobile_rec pp_ocrv5_server_rec pp_ocrv6_medium_det pp_ocrv6_small_det pp_ocrv6_small_rec "
        "pp_ocrv6_tiny_rec uvdoc"
    ),
    "returns a depth map, not an embedding": "depth_pro",
    "returns a larger image, not an embedding": "swin2sr",
    "hides patches at random": "vit_mae",
    "fails in bfloat16": "deberta falcon_mamba mamba mamba2 mra swinv2 xlnet",
    "has no mask, so that padding changes the embedding": "convbert cpmant fnet yoso",
    "takes texts of certain lengths only": "canine reformer",
    "has weights that a text's embedding gives no gradient": "deepseek_v4 longcat_flash",
    "returns no hidden states": (
        "dpr fastspeech2_conformer fastspeech2_conformer_with_hifigan hgnet_v2 higgs_audio_v2 vits"
    ),
    "needs the place of every token on a page": "bros lilt",
    "needs the language of every text": "xmod",
    "makes sounds or embeds them": "musicgen musicgen_melody pe_audio pe_audio_video pe_video",
    "is an encoder-decoder, whose decoder needs inputs of its own": "t5gemma",
}
# Images in patches with masks and shapes, which `get_image_features` passes on: converted models of this kind work.
WITH_OWN_INPUTS = {"siglip2_vision_model"}
REFUSED = {name: reason for reason, names in REASONS.items() for name in names.split()}


def require_encoder(config: PreTrainedConfig, side: str, encoders: dict[str, Any]) -> None:
    """
    Raise unless an architecture can be the `"vision"` or `"text"` tower; `encoders` are classes that AutoModel lacks.

    Raises:
        ValueError: it has no encoder in Transformers, takes other inputs, or is known to fail; the message names it.
    """
    name, field = config.model_type, f"{side}_config"
    if side == "vision" and name in WITH_OWN_INPUTS:
        return
    reason = REFUSED.get(name)
    if reason is None:
        encoder_class = encoders.get(name) or _encoder_class(config)
        reason = "has no encoder in Transformers" if encoder_class is None else _mismatch(encoder_class, side)
        if reason is None and getattr(config, "is_encoder_decoder", False) and not _is_text_encoder(config):
            reason = f"is an encoder-decoder, whose decoder needs inputs of its own ({encoder_class.__name__})"
    if reason is not None:
        default = "clip_vision_model, siglip_vision_model, dinov2" if side == "vision" else "clip_text_model, bert, t5"
        kind = "an image" if side == "vision" else "a text"
        raise ValueError(f"{field} is {name!r}, which {reason}. Choose {kind} encoder such as {default}.")


def _is_text_encoder(config: PreTrainedConfig) -> bool:
    """Return whether Transformers knows the encoder alone of an encoder-decoder, as of T5."""
    return type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING


def _encoder_class(config: PreTrainedConfig) -> Any:
    for mapping in (MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING):
        if type(config) in mapping:
            try:
                encoder_class = mapping[type(config)]
            except ValueError:  # a name that Transformers lists without having the class
                return None
            return encoder_class[0] if isinstance(encoder_class, list | tuple) else encoder_class
    return None


def _mismatch(encoder_class: Any, side: str) -> str | None:
    """Return how an encoder's inputs differ from those of the side, or None."""
    main, name = INPUTS[side], encoder_class.__name__
    parameters = inspect.signature(encoder_class.forward).parameters
    if main not in parameters or encoder_class.main_input_name != main:
        return f"does not take {main} ({name})"
    modalities = encoder_class.input_modalities
    modalities = {modalities} if isinstance(modalities, str) else set(modalities)
    if modalities not in MODALITIES[side]:
        return f"takes {', '.join(sorted(modalities))} ({name})"
    required = [
        key
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and key not in ("self", main)
    ]
    return f"also needs {' and '.join(required)} ({name})" if required else None
