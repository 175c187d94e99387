"""
Write an AmorLIP model as the CLIP or SigLIP of Transformers, which every tool that knows these can read.

    python -m modeling_amorlip.convert_amorlip_to_clip --source outputs/emoji_demo --output outputs/emoji_as_clip

`AutoModel.from_pretrained("outputs/emoji_as_clip")` then gives a `CLIPModel` or a `SiglipModel` with the same
embeddings, logits and pipeline scores, without this package and without `trust_remote_code`. The heads are left out.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from transformers import (
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

from .cli_amorlip import UserError, as_user_error, cli_entry_point
from .configuration_amorlip import AmorLIPConfig
from .loading_amorlip import check_output_folder, load_amorlip
from .modeling_amorlip import AmorLIPModel


# The towers that each dual encoder of Transformers is made of.
SIGMOID_MODELS: dict[tuple[str, str], tuple[Any, Any]] = {
    ("siglip_vision_model", "siglip_text_model"): (SiglipConfig, SiglipModel),
    ("siglip2_vision_model", "siglip2_text_model"): (Siglip2Config, Siglip2Model),
}
CLIP_TOWERS = ("clip_vision_model", "clip_text_model")


def convert_to_transformers(model: AmorLIPModel, *, drop_logit_bias: bool = False) -> PreTrainedModel:
    """
    Build Transformers' CLIP or SigLIP with the towers, projections, logit scale and logit bias of a model.

    Args:
        drop_logit_bias: leave out the logit bias of a model with CLIP's towers, which `CLIPModel` has no place for.
            Embeddings and the softmax over labels stay; a sigmoid's probabilities can no longer be computed.

    Raises:
        ValueError: neither CLIP nor SigLIP has these encoders, projections, pooling or bias.
    """
    config = model.config
    towers = (config.vision_config.model_type, config.text_config.model_type)
    other: Any  # mypy does not see through PreTrainedModel.to
    if {config.vision_pooling, config.text_pooling} != {"pooler"} and towers in (CLIP_TOWERS, *SIGMOID_MODELS):
        raise ValueError(
            f"vision_pooling is {config.vision_pooling!r} and text_pooling {config.text_pooling!r}; Transformers' CLIP "
            "and SigLIP have 'pooler' alone."
        )
    if towers == CLIP_TOWERS:
        other = _build_clip(model, drop_logit_bias)
    elif towers in SIGMOID_MODELS:
        other = _build_siglip(model, *SIGMOID_MODELS[towers])
    else:
        raise ValueError(
            f"Transformers' CLIP and SigLIP have no place for the encoders {towers}; convert a model with both towers "
            f"of one of them: {', '.join(map(str, (CLIP_TOWERS, *SIGMOID_MODELS)))}."
        )
    weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith("amortizer.")}
    expected = other.state_dict()
    weights = {name: weight.reshape(expected[name].shape) for name, weight in weights.items() if name in expected}
    other.load_state_dict(weights)
    return other.to(model.dtype).eval()


def _build_clip(model: AmorLIPModel, drop_logit_bias: bool) -> PreTrainedModel:
    config = model.config
    _check_projections(config, has_projections=True)
    if model.logit_bias is not None and not drop_logit_bias:
        raise ValueError(
            f"The model has a logit bias ({model.logit_bias.item():.4g}) and scores each label by a sigmoid, which "
            "CLIPModel does not. Pass --drop_logit_bias to convert it for its embeddings."
        )
    return CLIPModel(
        CLIPConfig(
            vision_config=config.vision_config.to_dict(),
            text_config=config.text_config.to_dict(),
            projection_dim=config.projection_dim,
            logit_scale_init_value=model.logit_scale.item(),
        )
    )


def _build_siglip(model: AmorLIPModel, config_class: Any, model_class: Any) -> PreTrainedModel:
    config = model.config
    _check_projections(config, has_projections=False)
    if model.logit_bias is None:
        raise ValueError(
            f"The model has no logit bias and scores labels by a softmax; {model_class.__name__} scores each by a "
            "sigmoid with a bias. Publish the model as it is, with trust_remote_code."
        )
    return model_class(
        config_class(vision_config=config.vision_config.to_dict(), text_config=config.text_config.to_dict())
    )


def _check_projections(config: AmorLIPConfig, *, has_projections: bool) -> None:
    if (config.vision_projection, config.text_projection) != (has_projections, has_projections):
        raise ValueError(
            f"vision_projection is {config.vision_projection} and text_projection {config.text_projection}; "
            f"{'CLIP' if has_projections else 'SigLIP'} of Transformers has {has_projections} for both."
        )


@cli_entry_point
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="AmorLIP model: a folder or a name on the Hub")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument(
        "--drop_logit_bias",
        action="store_true",
        help="convert a model with CLIP's towers and a logit bias for its embeddings alone",
    )
    arguments = parser.parse_args()
    check_output_folder(arguments.output, arguments.source)
    with as_user_error(ValueError, OSError, ImportError):
        model, processor = load_amorlip("--source", arguments.source)
        if processor is None:
            raise UserError(
                f"--source {arguments.source} has no processor; save it there with processor.save_pretrained."
            )
        other = convert_to_transformers(model, drop_logit_bias=arguments.drop_logit_bias)
        other.save_pretrained(arguments.output)
        processor.save_pretrained(arguments.output)
    print(f"{type(other).__name__}: {arguments.output}")


if __name__ == "__main__":
    sys.exit(main())
