"""
Convert Transformers' CLIP and SigLIP, OpenCLIP's models and the AmorLIP authors' checkpoints to AmorLIP models.

    python -m modeling_amorlip.convert_clip_to_amorlip --source openai/clip-vit-base-patch32 --output outputs/converted
    python -m modeling_amorlip.convert_clip_to_amorlip --source open_clip_model.safetensors --tokenizer NAME ...
    python -m modeling_amorlip.convert_clip_to_amorlip --source logs/NAME/checkpoints/epoch_33.pt --output ...

Embeddings equal the source's. Only the authors' checkpoints have heads; otherwise none are saved, and a model loaded
from the folder warns of fresh ones. Pickles are read as tensors only, and refused if they hold code.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, CLIPProcessor
from transformers.utils import cached_file

from .cli_amorlip import as_user_error, cli_entry_point
from .configuration_amorlip import AmorLIPConfig
from .loading_amorlip import check_output_folder, load_complete
from .modeling_amorlip import AmorLIPModel
from .open_clip_amorlip import from_open_clip_names, open_clip_architecture
from .open_clip_images_amorlip import image_processor_from_open_clip


TRANSFORMERS_TYPES = ("clip", "siglip", "siglip2")
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")


class Converted(NamedTuple):
    """A model with the source's embeddings, its processor where one is known, and whether its heads are trained."""

    model: AmorLIPModel
    processor: Any | None
    has_heads: bool


def convert(
    source: str | os.PathLike,
    *,
    quick_gelu: bool | None = None,
    tokenizer: str | os.PathLike | None = None,
    batch_size: int | None = None,
) -> Converted:
    """
    Convert a model, which then has the source's embeddings.

    Args:
        source: a folder or a name on the Hub of Transformers' CLIP or SigLIP or of OpenCLIP, or an OpenCLIP checkpoint
            file (.safetensors, or a pickle of tensors).
        quick_gelu: activation of an OpenCLIP checkpoint. Defaults to what its open_clip_config.json or params.txt says;
            without these, to QuickGELU for OpenAI's own weights and to GELU, OpenCLIP's default, for others.
        tokenizer: folder or name on the Hub of the tokenizer for an OpenCLIP checkpoint.
        batch_size: global batch size of a run of the AmorLIP authors' code, whose heads predict a log-sum over the
            batch, while ours predict a log-mean. Defaults to what the run's params.txt says.

    Raises:
        ValueError: the source cannot be converted, or holds code; the message says what to do.
    """
    if os.path.isfile(source):
        return convert_open_clip(Path(source), quick_gelu=quick_gelu, tokenizer=tokenizer, batch_size=batch_size)
    path = cached_file(source, "config.json", _raise_exceptions_for_missing_entries=False)
    model_type = path and _read_json(Path(path)).get("model_type")
    if model_type in TRANSFORMERS_TYPES:
        return convert_transformers(source)
    for name in OPEN_CLIP_FILES:
        if path := cached_file(source, name, _raise_exceptions_for_missing_entries=False):
            cached_file(source, "open_clip_config.json", _raise_exceptions_for_missing_entries=False)  # beside it
            return convert_open_clip(Path(path), quick_gelu=quick_gelu, tokenizer=tokenizer, batch_size=batch_size)
    raise ValueError(
        f"{source} has no open_clip_model.safetensors, and the model_type in its config.json is {model_type!r}; "
        f"convert OpenCLIP's models or one of {TRANSFORMERS_TYPES}."
    )


def save(converted: Converted, folder: str | os.PathLike) -> None:
    """Write model and processor, without heads that were never trained."""
    weights = converted.model.state_dict()
    if not converted.has_heads:
        weights = {name: weight for name, weight in weights.items() if not name.startswith("amortizer.")}
    converted.model.save_pretrained(folder, state_dict=weights)
    if converted.processor is not None:
        converted.processor.save_pretrained(folder)


# -- Transformers ------------------------------------------------------------------------------------------------------


def convert_transformers(source: str | os.PathLike) -> Converted:
    """Convert a folder or a name on the Hub of Transformers' CLIP or SigLIP, whose towers are taken as they are."""
    try:
        other = load_complete(source, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # Transformers, safetensors and the Hub's client raise many types
        raise ValueError(f"{source} cannot be loaded: {error}") from error
    config = other.config
    projects = config.model_type == "clip"
    if not projects and not getattr(config.vision_config, "vision_use_head", True):
        raise ValueError(f"{source}: vision_config.vision_use_head is False, so the model has no image embedding.")
    model = _build(
        other.state_dict(),
        vision_config=config.vision_config.to_dict(),
        text_config=config.text_config.to_dict(),
        projection_dim=config.projection_dim if projects else config.vision_config.hidden_size,
        vision_projection=projects,
        text_projection=projects,
    )
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError):
        processor = None
    if processor is not None and not projects:
        # SigLIP's texts are padded to the context, by the tokenizer's token rather than the configuration's default.
        model.config.text_config.pad_token_id = processor.tokenizer.pad_token_id
    return Converted(model, processor, False)


def _build(weights: dict[str, Tensor], **fields) -> AmorLIPModel:
    """Build a model with these weights, which must be all of its own except the heads."""
    weights = {name: w.reshape(()) if name.startswith("logit_") else w for name, w in weights.items()}  # [1] in SigLIP
    model = AmorLIPModel(AmorLIPConfig(**fields, logit_bias_init_value=0.0 if "logit_bias" in weights else None))
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # a shape differs
        raise ValueError(str(error)) from None
    missing = [name for name in missing if not name.startswith("amortizer.")]
    if missing or unexpected:
        raise ValueError(
            f"The checkpoint's architecture is not CLIP's: {len(missing)} weights are missing, such as {missing[:3]}, "
            f"and {len(unexpected)} have no place, such as {unexpected[:3]}."
        )
    # So that a model built from the configuration alone starts where this one is.
    model.config.logit_scale_init_value = model.logit_scale.item()
    model.config.logit_bias_init_value = None if model.logit_bias is None else model.logit_bias.item()
    return model.eval()


# -- OpenCLIP ----------------------------------------------------------------------------------------------------------


def convert_open_clip(
    path: Path, *, quick_gelu: bool | None = None, tokenizer=None, batch_size: int | None = None
) -> Converted:
    """Convert a checkpoint file in OpenCLIP's or OpenAI's layout, ViT or ResNet; see `convert`."""
    checkpoint = load_tensors(path)
    config = _read_open_clip_config(path.with_name("open_clip_config.json"))
    run = _read_run_parameters(path.parent.parent / "params.txt")
    weights = _plain_names(checkpoint.get("state_dict", checkpoint))
    is_openai = weights.pop("input_resolution", None) is not None
    for name in ("context_length", "vocab_size", "attn_mask"):
        weights.pop(name, None)
    if quick_gelu is None:
        quick_gelu = config.get("model_cfg", {}).get("quick_gelu", is_openai)
        quick_gelu |= run.get("force_quick_gelu") == "True" or run.get("model", "").endswith("-quickgelu")
    fields = open_clip_architecture(weights, config.get("model_cfg", {}), "quick_gelu" if quick_gelu else "gelu")
    heads = {}
    if head_names := [n for n in ("lambda_ema_mlps_state_dict", "lambda_mlps_state_dict") if n in checkpoint]:
        # The EMA target network is the one that the encoders were trained against.
        heads = _convert_heads(_plain_names(checkpoint[head_names[0]]), run, batch_size, weights["logit_scale"].exp())
        hidden, width = heads["amortizer.image_head.fc1.weight"].shape
        fields["amortizer_config"] = {"width_factor": hidden / width}
    model = _build(from_open_clip_names(weights) | heads, **fields)
    return Converted(model, _open_clip_processor(model.config, config, tokenizer), bool(heads))


def load_tensors(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint file, without running code that it may hold.

    Raises:
        ValueError: it is no checkpoint, or holds more than tensors, numbers and texts.
    """
    # Schedules often save learning rates as NumPy numbers, which are data too.
    scalar = np.float64().__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    numbers: list[Any] = [*((scalar, name) for name in names), np.dtype, type(np.dtype(np.float64))]
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(numbers):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many types for files that are something else
        if code := re.search(r"GLOBAL (\S+)|TorchScript", str(error)):
            reason = f"it holds code that would run on loading ({code[1] or code[0]})"
        else:
            reason = "it is no readable file of tensors"
        raise ValueError(f"{path} is refused: {reason}. Use safetensors, or a bare state_dict.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; a dictionary of tensors is needed.")
    return content


def _plain_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strip the prefixes of DistributedDataParallel, torch.compile and OpenCLIP's CustomTextCLIP from the names."""
    return {re.sub(r"^(module\.|_orig_mod\.)*(text\.)?", "", str(name)): weight for name, weight in weights.items()}


def _read_open_clip_config(path: Path) -> dict:
    return _read_json(path) if path.exists() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); fetch or save it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not the settings of a model; fetch it again.")
    return content


def _open_clip_processor(config: AmorLIPConfig, open_clip_config: dict, tokenizer):
    """Build CLIP's processor with the checkpoint's preprocessing; None without a tokenizer."""
    if tokenizer is None:
        return None
    tokenizer, text = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False), config.text_config
    if tokenizer.eos_token_id != text.eos_token_id or len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and ends texts with {tokenizer.eos_token_id}; the checkpoint "
            f"has {text.vocab_size} and reads at {text.eos_token_id}. Name the tokenizer that it was trained with."
        )
    tokenizer.model_max_length = text.max_position_embeddings
    image_processor = image_processor_from_open_clip(
        open_clip_config.get("preprocess_cfg", {}), config.vision_config.image_size
    )
    return CLIPProcessor(image_processor, tokenizer)


# -- the AmorLIP authors' runs -----------------------------------------------------------------------------------------


def _read_run_parameters(path: Path) -> dict[str, str]:
    """Read a run's `params.txt`, one `name: value` per line."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return dict(line.split(": ", 1) for line in lines if ": " in line)


def _convert_heads(heads: dict[str, Tensor], run: dict[str, str], batch_size: int | None, scale: Tensor):
    """Convert the authors' `LambdaMLPs` to `residual_mlp` heads, which predict the log-mean, not the log-sum."""
    if run.get("normalize_type", "L2") != "L2":
        raise ValueError(f"params.txt: normalize_type is {run['normalize_type']}; only L2 can be converted.")
    batch_size = _global_batch_size(run, batch_size)
    ours = {}
    for name, weight in heads.items():
        modality, _, rest = name.partition("_mlp.")
        ours[f"amortizer.{modality}_head.{rest.replace('fc3.', 'out.')}"] = weight.float()
    for head in ("amortizer.image_head", "amortizer.text_head"):
        ours[f"{head}.out.bias"] = ours[f"{head}.out.bias"] - math.log(batch_size - 1)
        if run.get("denormalize_features") == "True":
            # Their input was a x with a = sqrt(scale), in fc1 and in the residual: relu(h + a x) = a relu(h / a + x).
            a = scale.float().sqrt()
            for name, factor in (("fc1.weight", a), ("norm2.weight", 1 / a), ("norm2.bias", 1 / a), ("out.weight", a)):
                ours[f"{head}.{name}"] = ours[f"{head}.{name}"] * factor
    return ours


def _global_batch_size(run: dict[str, str], batch_size: int | None) -> int:
    if batch_size is None and "batch_size" not in run:
        raise ValueError(
            "The heads of this checkpoint predict a sum over a batch, whose size it does not record: give batch_size "
            "(--batch_size N, over all processes), or put the run's params.txt back."
        )
    if batch_size is None:
        batch_size = int(run["batch_size"]) * int(run.get("world_size", 1))
    if batch_size < 2:
        raise ValueError(f"batch_size is {batch_size}; a partition sum needs at least 2 pairs.")
    return batch_size


@cli_entry_point
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", required=True, help="model to convert: a folder, a checkpoint file or a name on the Hub"
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument(
        "--tokenizer", help="tokenizer for an OpenCLIP checkpoint, which has none: a folder or a name on the Hub"
    )
    parser.add_argument(
        "--batch_size", type=int, help="global batch size of a run of the AmorLIP authors' code, in pairs"
    )
    parser.add_argument(
        "--quick_gelu",
        action=argparse.BooleanOptionalAction,
        help="activation of an OpenCLIP checkpoint (default: what it says)",
    )
    arguments = parser.parse_args()
    check_output_folder(arguments.output, arguments.source)
    with as_user_error(ValueError, OSError, ImportError):
        converted = convert(
            arguments.source,
            quick_gelu=arguments.quick_gelu,
            tokenizer=arguments.tokenizer,
            batch_size=arguments.batch_size,
        )
        save(converted, arguments.output)
    config = converted.model.config
    print(
        f"{config.vision_config.model_type} and {config.text_config.model_type} "
        f"({config.text_config.hidden_act}), {config.projection_dim} dimensions, "
        f"{'with' if converted.has_heads else 'without'} heads, "
        f"{'with' if converted.processor is not None else 'without'} processor: {arguments.output}"
    )


if __name__ == "__main__":
    sys.exit(main())
