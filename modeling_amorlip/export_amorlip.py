"""
Both encoders of an AmorLIP model for other runtimes, batch and text length dynamic, embeddings of unit norm.

    python -m modeling_amorlip.export_amorlip --model outputs/emoji_demo --output outputs/emoji_onnx

writes `vision_model.onnx` (pixel_values -> image_embeds), `text_model.onnx` (input_ids, attention_mask -> text_embeds)
and the processor. `--format pt2` writes programs for `torch.export.load` instead. ONNX needs the extra `export`.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import AutoModel, AutoProcessor

from .modeling_amorlip import AmorLIPModel


AXES = {
    "vision_model": {"pixel_values": {0: "batch"}},
    "text_model": {"input_ids": {0: "batch", 1: "length"}, "attention_mask": {0: "batch", 1: "length"}},
}


class ImageEmbedder(nn.Module):
    """pixel_values [I, channels, height, width] -> unit-norm image_embeds [I, d]."""

    def __init__(self, model: AmorLIPModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return nn.functional.normalize(self.model.get_image_features(pixel_values).pooler_output, dim=-1)


class TextEmbedder(nn.Module):
    """input_ids, attention_mask [T, length] -> unit-norm text_embeds [T, d]."""

    def __init__(self, model: AmorLIPModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        outputs = self.model.get_text_features(input_ids, attention_mask)
        return nn.functional.normalize(outputs.pooler_output, dim=-1)


def export_encoders(model: AmorLIPModel) -> dict[str, ExportedProgram]:
    """`vision_model` and `text_model` as `torch.export` programs, in the model's dtype and on its device."""
    vision = model.config.vision_config
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.zeros(2, getattr(vision, "num_channels", 3), height, width, device=model.device)
    tokens = torch.ones(2, 4, dtype=torch.long, device=model.device)
    inputs = {"vision_model": (pixels,), "text_model": (tokens, tokens.clone())}
    encoders = {"vision_model": ImageEmbedder(model).eval(), "text_model": TextEmbedder(model).eval()}
    programs = {}
    for name, encoder in encoders.items():
        shapes = {argument: dict.fromkeys(axes, Dim.DYNAMIC) for argument, axes in AXES[name].items()}
        with torch.no_grad():
            programs[name] = torch.export.export(encoder, inputs[name], dynamic_shapes=shapes)
    return programs


def export(model: AmorLIPModel, output: str | os.PathLike, format: str = "onnx") -> list[Path]:
    """Writes both encoders into a folder, as `"onnx"` or `"pt2"`, and returns their paths."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, program in export_encoders(model).items():
        path = folder / f"{name}.{format}"
        if format == "pt2":
            torch.export.save(program, path)
        else:
            embeds = "image_embeds" if name == "vision_model" else "text_embeds"
            exported = torch.onnx.export(
                program,
                input_names=list(AXES[name]),
                output_names=[embeds],
                dynamic_shapes=AXES[name],  # for the names of the axes; that they are dynamic the program knows
                dynamo=True,
                verbose=False,
            )
            exported.save(path)
        paths.append(path)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name on the Hub")
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument("--format", choices=("onnx", "pt2"), default="onnx")
    arguments = parser.parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of operators of torchvision, which nothing uses
    model = AutoModel.from_pretrained(arguments.model, dtype=torch.float32)
    for path in export(model, arguments.output, arguments.format):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    AutoProcessor.from_pretrained(arguments.model).save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
