"""Low-rank adapters (LoRA, Hu et al. 2021) on the encoders of a model whose weights stay as they are, through PEFT.

    accelerate launch training/pretrain.py --config RECIPE.yaml --model outputs/converted --lora.rank 8

Beside the adapters, logit scale, bias and the objective's heads are trained. The finished model is written twice:
merged, as any model, and in `adapter/` what was trained alone, for PEFT to put on the model that it was trained on.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file
from torch import nn

from modeling_amorlip import AmorLIPModel
from modeling_amorlip.cli_amorlip import UserError
from training.config import LoraConfig


if TYPE_CHECKING:
    from peft import PeftModel


def add_adapters(model: AmorLIPModel, lora: LoraConfig, freeze: Iterable[str] = ()) -> PeftModel:
    """Puts adapters into a model's encoders, in place, and freezes all else but logit scale and bias.

    Args:
        freeze: `"vision"` or `"text"`, an encoder to leave as it is.

    Returns:
        PEFT's wrapper of the same model.

    Raises:
        UserError: PEFT is not installed, or `lora.target_modules` match no layer, or none that it can adapt.
    """
    try:
        import peft  # late: no other run needs it
    except ImportError:
        raise UserError('lora needs PEFT, which is not installed: pip install "amorlip[lora]", or peft.') from None
    sides = [side for side in ("vision", "text") if side not in freeze]
    names = "|".join(map(re.escape, lora.target_modules))
    for side in sides:
        encoder = model.get_submodule(f"{side}_model")
        if not any(re.fullmatch(rf"(.*\.)?({names})", name) for name, _ in encoder.named_modules()):
            raise UserError(_no_match(lora, side, encoder))
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=rf"({'|'.join(sides)})_model\.(.*\.)?({names})",
    )
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"lora.target_modules {lora.target_modules}: {error}") from None
    for parameter in (model.logit_scale, model.logit_bias):
        if parameter is not None:
            parameter.requires_grad_(True)
    return adapted


def _no_match(lora: LoraConfig, side: str, encoder: nn.Module) -> str:
    layers = {name.rpartition(".")[2] for name, m in encoder.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    return (
        f"lora.target_modules {lora.target_modules} match no layer of the {side} encoder, a {type(encoder).__name__}. "
        f"Its layers are {', '.join(sorted(layers))}: add some of them, or leave the encoder alone with "
        f"freeze: [{side}]."
    )


def save_adapted(adapted: PeftModel, folder: Path) -> None:
    """Writes the merged model into a folder and, into its `adapter/`, all that was trained; changes no weight.

    `PeftModel.from_pretrained(base, folder / "adapter")` gives the same embeddings, logits and log-partitions.
    """
    copy.deepcopy(adapted).merge_and_unload().save_pretrained(folder)
    folder = folder / "adapter"
    adapted.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's form for a model card, not filled in
    # PEFT saves layers only, but loads whatever has a name: logit scale, bias and heads are trained too.
    trained = {
        f"base_model.model.{name}": weight.contiguous()
        for name, weight in adapted.get_base_model().state_dict().items()
        if name.startswith(("logit_", "amortizer."))
    }
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | trained, file, metadata={"format": "pt"})
