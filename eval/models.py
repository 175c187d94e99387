"""Loads the models that are evaluated."""

from __future__ import annotations

import hashlib
from pathlib import Path

from modeling_amorlip.cli_amorlip import UserError


def load_model(name: str):
    """(model, processor) of a folder or repository; raises `UserError` when they cannot be loaded."""
    from transformers import AutoModel, AutoProcessor

    import modeling_amorlip  # noqa: F401  registers AmorLIP

    if name.startswith("open_clip:"):
        from eval.open_clip_models import load_open_clip

        return load_open_clip(name.removeprefix("open_clip:"))
    if (name.startswith((".", "/")) or name.count("/") > 1) and not Path(name).is_dir():
        raise UserError(f"--model {name}: there is no such folder.")
    try:
        return AutoModel.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--model {name} cannot be loaded: {reason}") from None


def revision(name: str, model) -> str | None:
    """The commit of a model from the Hub; of a folder, the beginning of its weights' SHA-256."""
    if weights := sorted(Path(name).glob("model*.safetensors")):
        digest = hashlib.sha256()
        for file in weights:
            digest.update(file.read_bytes())
        return digest.hexdigest()[:12]
    return getattr(model.config, "_commit_hash", None)
