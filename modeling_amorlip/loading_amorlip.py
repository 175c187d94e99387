"""Load the model that a converter's or the export's command line names, and check the folder that it writes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoProcessor

from .cli_amorlip import UserError
from .modeling_amorlip import AmorLIPModel


def load_amorlip(option: str, name: str | os.PathLike) -> tuple[AmorLIPModel, Any]:
    """
    Return an AmorLIP model in float32 and its processor, None where there is none.

    Args:
        option: the command-line option that named it, for messages.
        name: a folder or a name on the Hub.

    Raises:
        UserError: it cannot be loaded, lacks weights, or is another model.
    """
    try:
        model = load_complete(name, dtype=torch.float32)
    except Exception as error:  # Transformers, safetensors and the Hub's client raise many types
        raise UserError(f"{option} {name} cannot be loaded: {error}") from error
    if not isinstance(model, AmorLIPModel):
        raise UserError(f"{option} {name} is a {type(model).__name__}; name an AmorLIPModel.")
    try:
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError):
        processor = None
    return model, processor


def load_complete(name: str | os.PathLike, **options: Any) -> Any:
    """
    Return what `AutoModel.from_pretrained` does; `has_fresh_heads` says whether its heads were not in the checkpoint.

    Raises:
        ValueError: other weights were not, which would be random.
    """
    model, info = AutoModel.from_pretrained(name, output_loading_info=True, **options)
    heads = [key for key in info["missing_keys"] if key.startswith("amortizer.")]
    if missing := sorted(set(info["missing_keys"]) - set(heads)):
        raise ValueError(f"its checkpoint lacks {len(missing)} weights, such as {missing[0]}; fetch or save it again.")
    model.has_fresh_heads = bool(heads)
    return model


def check_output_folder(name: str, source: str) -> None:
    """Raise `UserError` where the folder of `--output` cannot be written, or is the source's own, before the work."""
    folder = Path(name).absolute()
    if Path(source).is_dir() and Path(source).resolve() == folder.resolve():
        raise UserError(f"--output {name} is the folder of the model itself, which would be overwritten; name another.")
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--output {name} cannot be written: {existing} is no folder that may be; name another.")
