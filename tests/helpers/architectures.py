"""Every architecture that AutoConfig knows, tiny, as a tower: what must hold of one that is not refused."""

from __future__ import annotations

import inspect
import sys
import tempfile

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from modeling_amorlip import AmorLIPConfig, AmorLIPModel
from modeling_amorlip.architectures_amorlip import require_encoder
from modeling_amorlip.encoders_amorlip import ENCODERS
from tests.helpers.towers import IMAGE, SIZES, WORDS


SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "hidden_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "moe_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "vocab_size"), 64),
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "image_size": 64,
    "patch_size": 16,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
VISION = {**SIZES, **IMAGE, "model_type": "clip_vision_model"}
TEXT = {**SIZES, **WORDS, "model_type": "clip_text_model", "eos_token_id": 3}
MAX_PARAMETERS = 200_000_000
# Their sizes depend on each other, so that they cannot be made small by the rules below.
UNTRIED = [
    "axk1",
    "cohere_compass_text",
    "cosmos3_edge_text",
    "dbrx",
    "deepseek_v2",
    "dots1",
    "funnel",
    "gemma3n_text",
    "glm5_next_text",
    "hunyuan_vl_text",
    "zamba",
    "zamba2",
]
# Fields that do not follow from the names above.
SWIN = {"image_size": 224, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "embed_dim": 32}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
HALVES = {"rope_parameters": {**SECTIONS["rope_parameters"], "mrope_section": [1, 1, 0]}}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
FIELDS: dict[str, dict] = {
    "bamba": MAMBA,
    "codegen": {"rotary_dim": 8},
    "deepseek_v2": {"topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "donut-swin": SWIN,
    "dots1": {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "esm": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 4},
    "esmc": {"num_key_value_heads": 4},
    "glm4v_moe_text": HALVES,
    "glm4v_text": HALVES,
    "glm_image_text": HALVES,
    "glm_ocr_text": HALVES,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": MAMBA,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen2_5_vl_text": SECTIONS,
    "qwen2_vl_text": SECTIONS,
    "swin": SWIN,
    "textnet": {"image_size": (64, 64)},
    "zamba": {"num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}


def survey(side: str) -> dict[str, str]:
    """
    Try every architecture as the tower of a side: "works", "refused" or "untried", by name; those are left out whose
    configuration holds that of a tower of the side.

    Raises:
        AssertionError: some are neither refused at construction nor work; the message names them.
    """
    results, failures = {}, []
    for model_type in CONFIG_MAPPING_NAMES:
        if model_type in UNTRIED:
            results[model_type] = "untried"
        elif f"{side}_config" not in getattr(CONFIG_MAPPING[model_type], "sub_configs", {}):
            try:
                results[model_type] = try_architecture(model_type, side)
            except AssertionError as error:
                failures.append(str(error))

    assert not failures, "\n".join(failures)
    return results


def try_architecture(model_type: str, side: str) -> str:
    """Return "works", "refused" or "untried" for an architecture as the tower of a side."""
    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception:  # it has no defaults, or needs another library
        return "untried"
    try:
        require_encoder(config, side, ENCODERS)
    except (ValueError, ImportError) as refusal:
        assert config.model_type in str(refusal) or "library" in str(refusal), refusal
        return "refused"
    try:
        model = make_model(model_type, side)
    except (ValueError, ImportError) as refusal:  # of a width that the configuration does not say, or for a library
        no_width = f"{side}_config ({config.model_type}) has no hidden_size"
        assert no_width in str(refusal) or "library" in str(refusal), refusal
        return "refused"
    try:
        check_architecture(model, side)
    except Exception as error:
        raise AssertionError(f"{model_type} builds as a {side} tower and fails: {error}") from error
    return "works"


def make_tower_config(model_type: str) -> PreTrainedConfig:
    """Make the configuration of an architecture with small sizes, whatever it calls them."""
    config_class = CONFIG_MAPPING[model_type]
    names = {*inspect.signature(config_class.__init__).parameters, *vars(config_class()), *config_class.attribute_map}
    sizes = {name: value for name, value in SMALL.items() if name in names}
    if "qk_rope_head_dim" in names:  # heads of two parts
        sizes = {name: value for name, value in sizes.items() if name != "head_dim"} | {"num_key_value_heads": 4}
    if "hidden_sizes" in names or "depths" in names:  # sizes of stages, from which the others follow
        sizes = {name: value for name, value in sizes.items() if name in ("image_size", "vocab_size")}
    for name, value in vars(config_class()).items():
        if name in sizes and not isinstance(value, int):  # a list of sizes, or what is not set
            del sizes[name]
    return config_class(**sizes | FIELDS.get(model_type, {}))


def make_model(model_type: str, side: str) -> AmorLIPModel:
    """Make a tiny model with an architecture as its `"vision"` or `"text"` tower and CLIP's as the other."""
    torch.manual_seed(0)
    configs = {"vision_config": VISION, "text_config": TEXT, f"{side}_config": make_tower_config(model_type)}
    config = AmorLIPConfig(**configs, projection_dim=16)
    with torch.device("meta"):
        size = AmorLIPModel(config).num_parameters()
    if size > MAX_PARAMETERS:
        raise MemoryError(f"{model_type} has {size:,} parameters with small sizes.")
    return AmorLIPModel(config).eval()


def make_images(model: AmorLIPModel, number: int = 2) -> dict[str, torch.Tensor]:
    size = getattr(model.config.vision_config, "image_size", 64)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(model.config.vision_config, "num_channels", 3)
    generator = torch.Generator().manual_seed(0)
    if model.config.vision_config.model_type == "siglip2_vision_model":  # patches of images of any shape
        shapes = torch.tensor([[4, 4], [2, 6]])[:number]
        return {
            "pixel_values": torch.randn(number, 16, 3 * model.config.vision_config.patch_size**2, generator=generator),
            "pixel_attention_mask": (torch.arange(16) < shapes.prod(1, keepdim=True)).int(),
            "spatial_shapes": shapes,
        }
    return {"pixel_values": torch.randn(number, channels, height, width, generator=generator)}


def make_texts(pad: str = "") -> dict[str, torch.Tensor]:
    """Make two texts of 5 and 3 tokens; `pad` says on which side there is padding beyond the longest."""
    rows = [[0, 11, 12, 13, 2], [0, 21, 2]]
    length = 5 + 3 * bool(pad)
    ids, mask = torch.ones(2, length, dtype=torch.long), torch.zeros(2, length, dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(length - len(tokens), None) if pad == "left" else slice(0, len(tokens))
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    return {"input_ids": ids, "attention_mask": mask}


def check_architecture(model: AmorLIPModel, side: str) -> None:
    """Raise unless a tower works: forward, padding, backward, bfloat16, saving and loading."""
    is_text = side == "text"
    # SigLIP's texts are always padded to the same length, and their padding counts.
    is_siglip = model.config.text_config.model_type.startswith("siglip")
    inputs = {**make_texts(), **make_images(model)}
    key = "text_embeds" if is_text else "image_embeds"
    with torch.no_grad():
        expected = model(**inputs)[key]
        assert expected.shape == (2, 16) and expected.isfinite().all(), "forward"
        alone = model(**{name: tensor[1:] for name, tensor in inputs.items()})[key]
        if is_text:
            if not is_siglip:
                alone = model(input_ids=inputs["input_ids"][1:, :3]).text_embeds
            for pad in () if is_siglip else ("right", "left"):
                padded = model(**make_texts(pad)).text_embeds
                torch.testing.assert_close(padded, expected, rtol=1e-3, atol=1e-3, msg=lambda m: f"padding: {m}")
        torch.testing.assert_close(alone, expected[1:], rtol=1e-3, atol=1e-3, msg=lambda m: f"alone: {m}")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        loaded, info = AmorLIPModel.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], f"load: {info}"
        torch.testing.assert_close(loaded(**inputs)[key], expected, msg=lambda m: f"load: {m}")
        half = AmorLIPModel.from_pretrained(folder, dtype=torch.bfloat16)(**inputs)[key]
        assert half.dtype == torch.bfloat16 and half.isfinite().all(), "bfloat16"
    model.train()
    model(**inputs, return_loss=True).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient: {missing}"


if __name__ == "__main__":
    for name, result in survey(sys.argv[1]).items():
        print(name, result)
