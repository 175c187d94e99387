"""Load the AmorLIP model that a converter's or the export's command line names."""

from __future__ import annotations

import os
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
        UserError: it cannot be loaded, or is another model.
    """
    try:
        model = AutoModel.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {name} cannot be loaded: {error}") from error
    if not isinstance(model, AmorLIPModel):
        raise UserError(f"{option} {name} is a {type(model).__name__}; name an AmorLIPModel.")
    try:
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError):
        processor = None
    return model, processor
