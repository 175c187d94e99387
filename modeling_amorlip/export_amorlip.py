"""
Export both encoders of an AmorLIP model for other runtimes: any batch and text length, embeddings of unit norm.

    python -m modeling_amorlip.export_amorlip --model outputs/emoji_demo --output outputs/emoji_onnx

This writes `vision_model.onnx` (pixel_values -> image_embeds), `text_model.onnx` (input_ids, attention_mask ->
text_embeds) and the processor. `--format pt2` writes programs for `torch.export.load`. ONNX needs the extra `export`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import AutoModel, AutoProcessor

from .cli_amorlip import UserError, as_user_error, cli_entry_point
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


def export_encoders(model: AmorLIPModel, image_size: tuple[int, int] | None = None) -> dict[str, ExportedProgram]:
    """Export `vision_model` and `text_model` as `torch.export` programs, in the model's dtype and on its device.

    Args:
        image_size: height and width of the images, for encoders whose configuration has none, such as ResNet.
    """
    vision = model.config.vision_config
    size = getattr(vision, "image_size", None) or image_size
    if size is None:
        raise ValueError(f"vision_config ({vision.model_type}) has no image_size; give the images' height and width.")
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


def export(
    model: AmorLIPModel, output: str | os.PathLike, format: str = "onnx", image_size: tuple[int, int] | None = None
) -> list[Path]:
    """Write both encoders into a folder, as `"onnx"` or `"pt2"`, and return their paths; see `export_encoders`."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, program in export_encoders(model, image_size).items():
        path = folder / f"{name}.{format}"
        if format == "pt2":
            torch.export.save(program, path)
        else:
            embeds = "image_embeds" if name == "vision_model" else "text_embeds"
            exported = torch.onnx.export(
                program,
                input_names=list(AXES[name]),
                output_names=[embeds],
                dynamic_shapes=AXES[name],  # names the axes; the program already has them dynamic
                dynamo=True,
                verbose=False,
            )
            assert exported is not None  # as torch.onnx.export promises with dynamo
            exported.save(path)
        paths.append(path)
    return paths


def _processed_size(image_processor) -> tuple[int, int] | None:
    """Return height and width of the images that a processor makes."""
    has_crop = getattr(image_processor, "do_center_crop", False)
    size = dict(image_processor.crop_size if has_crop else image_processor.size)
    return (size["height"], size["width"]) if "height" in size else None


@cli_entry_point
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="AmorLIP model: a folder or a name on the Hub")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--format", choices=("onnx", "pt2"), default="onnx", help="file format (default: onnx)")
    arguments = parser.parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of torchvision's operators, which nothing uses
    with as_user_error(ValueError, OSError, ImportError):
        model = AutoModel.from_pretrained(arguments.model, dtype=torch.float32)
        if not isinstance(model, AmorLIPModel):
            raise UserError(f"--model {arguments.model} is a {type(model).__name__}; name an AmorLIPModel.")
        processor = AutoProcessor.from_pretrained(arguments.model)
        paths = export(model, arguments.output, arguments.format, _processed_size(processor.image_processor))
        processor.save_pretrained(arguments.output)
    for path in paths:
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
