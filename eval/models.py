"""Load the models that are evaluated, and tell them apart."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modeling_amorlip.cli_amorlip import UserError


ORIGIN_FIELDS = ("_name_or_path", "transformers_version", "auto_map")
"""Fields of a config.json that say where a model is from, and not what it computes."""


@dataclass
class ModelRecord:
    """What identifies a model.

    Args:
        name: Folder, Hub repository or open_clip name.
        revision: Commit of a Hub repository; otherwise the beginning of `weights`.
        parameters: Number of parameters.
        weights, processor, tokenizer, config: Hashes; "" in files that are older than they are.
    """

    name: str
    revision: str | None
    parameters: int
    weights: str = ""
    processor: str = ""
    tokenizer: str = ""
    config: str = ""


def load_model(
    name: str,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> tuple[Any, Any]:
    """Return (model, processor) of a dual encoder, in evaluation mode.

    Args:
        name: Folder, Hub repository, or "open_clip:ARCHITECTURE/TAG".
        device: Device to load the model to; defaults to the CPU.
        dtype: Type of the weights; defaults to the one they were saved in.
        revision: Branch, tag or commit of a Hub repository.

    Raises:
        UserError: It cannot be loaded, or is no dual encoder.
    """
    import modeling_amorlip  # noqa: F401  registers AmorLIP

    if name.startswith("open_clip:"):
        from eval.open_clip_models import load_open_clip

        model, processor = load_open_clip(name.removeprefix("open_clip:"))
        model = model if dtype is None else model.to(dtype)
    else:
        model, processor = _load_from_transformers(name, dtype, revision)
    return model.to(device or "cpu").eval(), processor


def _load_from_transformers(name: str, dtype: torch.dtype | None, revision: str | None) -> tuple[Any, Any]:
    from transformers import AutoProcessor

    from modeling_amorlip.loading_amorlip import load_complete

    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).expanduser().is_dir():
        raise UserError(f"--model {name}: there is no such folder.")
    path = str(Path(name).expanduser()) if name.startswith("~") else name
    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        model = load_complete(path, **options, **({"dtype": dtype} if dtype else {}))
    except Exception as error:  # Transformers, safetensors and the Hub's client raise many types
        raise UserError(f"--model {name} cannot be loaded: {_first_line(error)}") from None
    if missing := [m for m in ("get_image_features", "get_text_features") if not hasattr(model, m)]:
        raise UserError(
            f"--model {name} is a {type(model).__name__} without {' and '.join(missing)}; "
            "name a dual encoder of images and texts, such as AmorLIP, CLIP or SigLIP."
        )
    try:
        processor = AutoProcessor.from_pretrained(path, **options)
    except Exception as error:
        raise UserError(f"--model {name}: its processor cannot be loaded: {_first_line(error)}") from None
    if missing := [part for part in ("image_processor", "tokenizer") if getattr(processor, part, None) is None]:
        raise UserError(
            f"--model {name} has no {' and no '.join(missing)}; save the model's processor in its folder, "
            "with processor.save_pretrained."
        )
    return model, processor


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def revision(name: str, model: Any) -> str | None:
    """Return the commit of a model from the Hub; of any other, the beginning of its weights' hash, and its config's."""
    return hub_commit(name) or f"{weights_hash(name, model)[:12]} {config_hash(name)}".strip()


def hub_commit(name: str, revision: str | None = None) -> str | None:
    """Return the commit of a Hub repository that is in the local cache; None for folders and other names."""
    config = _cached_config(name, revision)
    return None if config is None else config.parent.name  # .../snapshots/COMMIT/config.json


def _cached_config(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if _is_local(name):
        return None
    path = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(path) if isinstance(path, str) else None


def _is_local(name: str) -> bool:
    return Path(name).expanduser().is_dir() or name.startswith("open_clip:")


def config_hash(name: str, revision: str | None = None) -> str:
    """Return a short hash of the settings in a model's config.json, "" where there is none (open_clip)."""
    path = Path(name).expanduser() / "config.json" if _is_local(name) else _cached_config(name, revision)
    if path is None or not path.is_file():
        return ""
    settings = json.loads(path.read_text(encoding="utf-8"))
    return _hash_text(json.dumps({k: v for k, v in settings.items() if k not in ORIGIN_FIELDS}, sort_keys=True))


def weights_hash(name: str, model: Any, revision: str | None = None) -> str:
    """Return the SHA-256 of a model's weight files, or of its weights where there are no files (open_clip)."""
    config = _cached_config(name, revision)
    folder = Path(name).expanduser() if config is None else config.parent
    if not name.startswith("open_clip:") and (files := weight_files(folder)):
        return hash_files(files)
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a folder that Transformers reads a model's weights from, and no others beside them."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [folder / name for name in sorted(names)]
    return []


def hash_files(files: list[Path]) -> str:
    """Return the SHA-256 of the contents of files, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def identify_model(name: str, model: Any, processor: Any, revision: str | None = None) -> ModelRecord:
    """Return what identifies a model that `load_model` loaded."""
    weights = weights_hash(name, model, revision)
    return ModelRecord(
        name=name,
        revision=hub_commit(name, revision) or weights[:12],
        parameters=sum(p.numel() for p in model.parameters()),
        weights=weights,
        processor=_hash_text(_describe_image_processor(processor.image_processor)),
        tokenizer=_hash_text(_describe_tokenizer(processor.tokenizer)),
        config=config_hash(name, revision),
    )


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _describe_image_processor(image_processor: Any) -> str:
    if hasattr(image_processor, "to_json_string"):
        return image_processor.to_json_string()
    return repr(getattr(image_processor, "transform", image_processor))


def _describe_tokenizer(tokenizer: Any) -> str:
    """Return all that decides a tokenizer's output as text; padding and truncation are set with each call."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        state = json.loads(backend.to_str())
        state.pop("padding", None), state.pop("truncation", None)
    elif hasattr(tokenizer, "get_vocab"):
        state = sorted(tokenizer.get_vocab().items())
    else:  # open_clip's, which is a function
        state = tokenizer(["A photo of two cats, 12 dogs & an ibex."])["input_ids"].tolist()
    side = getattr(tokenizer, "padding_side", None)
    return json.dumps([state, side, getattr(tokenizer, "model_max_length", None)], sort_keys=True)
