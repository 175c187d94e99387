"""Configuration of AmorLIP: two encoders of any kind, their projections and the amortizer heads."""

import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from .pipeline_amorlip import register_pipeline


POOLINGS = {"vision": ("pooler", "cls", "mean"), "text": ("pooler", "cls", "mean", "eos", "last")}
HEAD_TYPES = ("residual_mlp", "prototype", "random_features", "queue")


@strict
class AmorLIPAmortizerConfig(PreTrainedConfig):
    r"""
    The heads that predict log-partitions from embeddings (paper Section 3.2 and Appendix).

    Args:
        head_type (`str`, defaults to `"residual_mlp"`): `"residual_mlp"`, the paper's three-layer MLP; `"prototype"`,
            log-mean-exp over learned prototypes of the other modality; `"random_features"`, linear in positive random
            features (Proposition 1); `"queue"`, log-mean-exp over the last embeddings seen, nothing learned.
        width_factor (`float`, defaults to 0.5): hidden width of the MLP as a multiple of `projection_dim` (f_d).
        size (`int`, defaults to 4096): number of prototypes, random features or embeddings in the queue.
    """

    model_type = "amorlip_amortizer"
    base_config_key = "amortizer_config"

    head_type: str = "residual_mlp"
    width_factor: float | int = 0.5
    size: int = 4096

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        if self.head_type not in HEAD_TYPES:
            raise ValueError(f"amortizer_config.head_type is {self.head_type!r}; choose one of {HEAD_TYPES}.")
        if self.width_factor <= 0:
            raise ValueError(f"amortizer_config.width_factor is {self.width_factor}; it must be above 0.")
        if self.size < 1:
            raise ValueError(f"amortizer_config.size is {self.size}; it must be at least 1.")


@strict
class AmorLIPResNetConfig(PreTrainedConfig):
    r"""
    CLIP's ResNet as a vision encoder; the defaults are RN50. RN101 has depths (3, 4, 23, 3) and `output_dim` 512.

    Args:
        width (`int`, defaults to 64): channels of the first stage; the last one has 32 times as many.
        depths (`tuple`, defaults to `(3, 4, 6, 3)`): blocks of the four stages.
        num_attention_heads (`int`, defaults to 32): heads of the attention pool.
        image_size (`int`, defaults to 224): height and width of the images; the pool's grid is `image_size` // 32.
        output_dim (`int`, defaults to 1024): size of the pooled output.
    """

    model_type = "amorlip_resnet"
    base_config_key = "vision_config"
    attribute_map = {"hidden_size": "output_dim"}

    width: int = 64
    depths: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    num_attention_heads: int = 32
    image_size: int = 224
    output_dim: int = 1024

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        if self.width < 2 or self.width % 2:
            raise ValueError(f"width is {self.width}; it must be an even number.")
        if len(self.depths) != 4 or min(self.depths) < 1:
            raise ValueError(f"depths is {self.depths}; give four numbers of blocks, such as (3, 4, 6, 3).")
        if self.num_attention_heads < 1 or 32 * self.width % self.num_attention_heads:
            raise ValueError(f"num_attention_heads is {self.num_attention_heads}; it must divide {32 * self.width}.")
        if self.image_size < 32 or self.image_size % 2:
            raise ValueError(f"image_size is {self.image_size}; it must be an even number of at least 32.")


@strict
class AmorLIPConfig(PreTrainedConfig):
    r"""
    Configuration of an [`AmorLIPModel`].

    Args:
        vision_config, text_config (`dict` or `PreTrainedConfig`, *optional*): configurations of any encoders of
            Transformers; a `dict` names the encoder by its `model_type`, and a dual encoder such as CLIP gives its
            tower. Default to `CLIPVisionConfig()` and `CLIPTextConfig()`.
        amortizer_config (`dict` or `AmorLIPAmortizerConfig`, *optional*): the amortizer heads.
        vision_pooling (`str`, *optional*): how tokens become one embedding: `"pooler"`, by the encoder itself, as CLIP
            (CLS), SigLIP (attention) and DINOv2 (CLS) do; `"cls"`, the first token; `"mean"`. Defaults to what suits
            the encoder.
        text_pooling (`str`, *optional*): the same, or `"eos"`, the first end-of-text token, or `"last"`, the last
            token. Padding does not count. Defaults to the encoder's own for CLIP and SigLIP, `"last"` for causal
            language models and `"mean"` for others.
        projection_dim (`int`, defaults to 512): d, the size of the shared embedding space.
        vision_projection, text_projection (`bool`, *optional*): whether a linear layer maps the encoder's pooled
            output there; otherwise the pooled output is the embedding. Defaults to `True`, except for an encoder whose
            `output_dim` equals `projection_dim`, since it ends in a projection of its own.
        logit_scale_init_value (`float`, defaults to 2.6592): *logarithm* of the initial logit scale; log(1 / 0.07).
        logit_bias_init_value (`float`, *optional*): initial logit bias; without it the model has none.
    """

    model_type = "amorlip"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig, "amortizer_config": AmorLIPAmortizerConfig}

    # Dictionaries, configurations or None; configurations once the object is made.
    vision_config: Any = None
    text_config: Any = None
    amortizer_config: Any = None
    vision_pooling: str | None = None
    text_pooling: str | None = None
    projection_dim: int = 512
    vision_projection: bool | None = None
    text_projection: bool | None = None
    logit_scale_init_value: float | int = 2.6592
    logit_bias_init_value: float | int | None = None

    def __post_init__(self, **kwargs):
        self.architectures = self.architectures or ["AmorLIPModel"]  # AutoModel chooses among several classes by it
        self.vision_config = _encoder_config(self.vision_config, "vision_config", "clip_vision_model")
        self.text_config = _encoder_config(self.text_config, "text_config", "clip_text_model")
        if not isinstance(self.amortizer_config, AmorLIPAmortizerConfig):
            self.amortizer_config = AmorLIPAmortizerConfig(**_as_dict(self.amortizer_config))
        self.vision_pooling = self.vision_pooling or _vision_pooling(self.vision_config)
        self.text_pooling = self.text_pooling or _text_pooling(self.text_config)
        for side in ("vision", "text"):
            if getattr(self, f"{side}_projection") is None:
                output_dim = getattr(getattr(self, f"{side}_config"), "output_dim", None)
                setattr(self, f"{side}_projection", output_dim != self.projection_dim)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        if self.projection_dim < 1:
            raise ValueError(f"projection_dim is {self.projection_dim}; it must be at least 1.")
        for side, poolings in POOLINGS.items():
            if (pooling := getattr(self, f"{side}_pooling")) not in poolings:
                raise ValueError(f"{side}_pooling is {pooling!r}; choose one of {poolings}.")
        if self.text_pooling == "eos" and not isinstance(end := self.text_config.eos_token_id, int):
            raise ValueError(f"text_pooling is 'eos' and text_config.eos_token_id is {end}; set it to the tokenizer's.")
        image_size = getattr(self.vision_config, "image_size", None)
        patch_size = getattr(self.vision_config, "patch_size", None)
        if isinstance(image_size, int) and isinstance(patch_size, int) and image_size % patch_size:
            below = max(image_size - image_size % patch_size, patch_size)
            raise ValueError(
                f"vision_config.image_size ({image_size}) is no multiple of vision_config.patch_size ({patch_size}): "
                f"the patches would leave a border unseen. Use image_size {below} or {below + patch_size}, "
                "or another patch_size."
            )


def _as_dict(config: dict | PreTrainedConfig | None) -> dict:
    """A plain dictionary of keyword arguments; `None` stands for the defaults."""
    config = config.to_dict() if isinstance(config, PreTrainedConfig) else dict(config or {})
    return {key: value for key, value in config.items() if key != "model_type"}


def _encoder_config(config: dict | PreTrainedConfig | None, field: str, default_type: str) -> PreTrainedConfig:
    """Return a copy of an encoder's configuration; a dual encoder such as CLIP gives that of its tower."""
    if isinstance(config, PreTrainedConfig):
        return copy.deepcopy(getattr(config, field, config))
    model_type = (config or {}).get("model_type", default_type)
    try:
        config = AutoConfig.for_model(model_type, **_as_dict(config))
        return getattr(config, field, config)
    except (ValueError, TypeError) as error:
        if "Unrecognized model identifier" in str(error):
            raise ValueError(
                f"{field}.model_type is {model_type!r}, which Transformers does not know; "
                f"name an encoder such as {default_type!r}."
            ) from None
        raise ValueError(f"{field}: {error}") from None


def _vision_pooling(config: PreTrainedConfig) -> str:
    if config.model_type in ("deit", "radio", "vit", "vit_msn"):
        return "cls"  # their pooler, if there is one, is fresh in most checkpoints
    # And these have none, nor a CLS token that is trained.
    without = "data2vec-vision glpn ijepa internvl_vision poolformer pvt pvt_v2 qianfan_ocr_vision segformer vitdet"
    return "mean" if config.model_type in without.split() else "pooler"


def _text_pooling(config: PreTrainedConfig) -> str:
    name = config.model_type
    if name in ("clip_text_model", "siglip_text_model", "siglip2_text_model"):
        return "pooler"
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and name not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "last"
    # BERT and its kin have a pooler for the next-sentence task; the mean is what sentence encoders are trained with.
    return "mean"


# Here rather than in the package, which a folder loaded with trust_remote_code does not have, or in the model, which
# `pipeline()` loads only after it has looked up its class.
AutoConfig.register("amorlip_resnet", AmorLIPResNetConfig, exist_ok=True)
register_pipeline()
