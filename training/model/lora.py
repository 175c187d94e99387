"""Low-rank adapters (LoRA, Hu et al. 2021) on the encoders of a model whose weights stay fixed, through PEFT.

    accelerate launch training/pretrain.py --config RECIPE.yaml --model outputs/converted --lora.rank 8

Besides the adapters, the logit scale, the logit bias and the objective's heads are trained. The finished model is saved
twice: merged, like any model, and in `adapter/` the trained parameters alone, which PEFT puts on the original model.
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
    """Put adapters into a model's encoders, in place, and freeze everything else but the logit scale and bias.

    Args:
        model: the pretrained model.
        lora: rank, layers and dropout of the adapters.
        freeze: `"vision"` or `"text"`, an encoder that gets no adapters.

    Returns:
        PEFT's wrapper of the same model.

    Raises:
        UserError: PEFT is not installed, or `lora.target_modules` match no layer, or none that it can adapt.
    """
    try:
        import peft  # only runs with adapters need it
    except ImportError:
        raise UserError('lora needs PEFT, which is not installed: pip install "amorlip[lora]", or peft.') from None
    sides = [side for side in ("vision", "text") if side not in freeze]
    names = "|".join(map(re.escape, lora.target_modules))
    for side in sides:
        encoder = model.get_submodule(f"{side}_model")
        if not any(re.fullmatch(rf"(.*\.)?({names})", name) for name, _ in encoder.named_modules()):
            raise UserError(_describe_mismatch(lora, side, encoder))
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # fractions work, too
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


def _describe_mismatch(lora: LoraConfig, side: str, encoder: nn.Module) -> str:
    layers = {name.rpartition(".")[2] for name, m in encoder.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    return (
        f"lora.target_modules {lora.target_modules} match no layer of the {side} encoder, a {type(encoder).__name__}. "
        f"Its layers are {', '.join(sorted(layers))}: add some of them, or leave the encoder alone with "
        f"freeze: [{side}]."
    )


def save_adapted(adapted: PeftModel, folder: Path) -> None:
    """Save the merged model in a folder and the trained parameters alone in its `adapter/`; no weight changes.

    `PeftModel.from_pretrained(base, folder / "adapter")` gives the same embeddings, logits and log-partitions.
    """
    copy.deepcopy(adapted).merge_and_unload().save_pretrained(folder)
    folder = folder / "adapter"
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's template of a model card, not filled in
    # PEFT saves layers only but loads every named parameter: logit scale, bias and heads are trained too.
    trained = {
        f"base_model.model.{name}": weight.contiguous()
        for name, weight in adapted.get_base_model().state_dict().items()
        if name.startswith(("logit_", "amortizer."))
    }
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | trained, file, metadata={"format": "pt"})
