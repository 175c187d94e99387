"""
Export an AmorLIP model for other runtimes: any batch and text length, embeddings of unit norm.

    python -m modeling_amorlip.export_amorlip --model outputs/emoji_demo --output outputs/emoji_onnx

This writes what transformers.js reads: `onnx/model.onnx` (images and texts -> logits_per_image and embeddings),
`onnx/vision_model.onnx` (pixel_values -> image_embeds), `onnx/text_model.onnx` (input_ids, attention_mask ->
text_embeds), the processor and a config.json. `--quantize` adds the same with 8-bit weights. `--format pt2` writes
programs for `torch.export.load`. ONNX needs the extra `export`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .cli_amorlip import UserError, as_user_error, cli_entry_point
from .loading_amorlip import check_output_folder, load_amorlip
from .modeling_amorlip import AmorLIPModel
from .onnx_amorlip import DEFAULT_OPSET, quantize_onnx, save_onnx


AXES = {
    "pixel_values": {0: "image_batch"},
    "input_ids": {0: "text_batch", 1: "length"},
    "attention_mask": {0: "text_batch", 1: "length"},
}
OUTPUTS = ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]


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

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        outputs = self.model.get_text_features(input_ids, attention_mask)
        return nn.functional.normalize(outputs.pooler_output, dim=-1)


class PairScorer(nn.Module):
    """Images and texts -> logits_per_image [I, T], logits_per_text [T, I], text_embeds [T, d], image_embeds [I, d]."""

    def __init__(self, model: AmorLIPModel):
        super().__init__()
        self.images, self.texts, self.model = ImageEmbedder(model), TextEmbedder(model), model

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        image_embeds, text_embeds = self.images(pixel_values), self.texts(input_ids, attention_mask)
        logits = self.model.logit_scale.exp() * image_embeds @ text_embeds.T
        logits = logits if self.model.logit_bias is None else logits + self.model.logit_bias
        return logits, logits.T, text_embeds, image_embeds


def export(
    model: AmorLIPModel,
    output: str | os.PathLike,
    format: str = "onnx",
    image_size: tuple[int, int] | None = None,
    *,
    has_mask: bool = True,
    opset: int = DEFAULT_OPSET,
    quantize: bool = False,
) -> list[Path]:
    """
    Write the model and each of its encoders into a folder, and return the files' paths.

    Args:
        format: `"onnx"` writes into the subfolder `onnx`, `"pt2"` programs of `torch.export` into the folder itself.
        image_size: height and width of the images, for encoders whose configuration has none, such as ResNet.
        has_mask: whether the tokenizer returns an attention mask; if it does not (SigLIP's), none is an input.
        opset: version of ONNX's operators.
        quantize: also write the ONNX files with 8-bit weights.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    inputs = _example_inputs(model, image_size, has_mask)
    if format == "pt2":
        paths = []
        encoders = {"model": PairScorer, "vision_model": ImageEmbedder, "text_model": TextEmbedder}
        for name, encoder in encoders.items():
            paths.append(folder / f"{name}.pt2")
            torch.export.save(_trace(encoder(model), inputs), paths[-1])
        return paths
    folder = folder / "onnx"
    folder.mkdir(exist_ok=True)
    axes = {name: AXES[name] for name in inputs}
    program = _trace(PairScorer(model), inputs)
    paths = save_onnx(program, folder, axes, OUTPUTS, opset=opset, metadata=_scales(model))
    if quantize:
        paths += [file for path in list(paths) if path.suffix == ".onnx" for file in quantize_onnx(path)]
    return paths


def _example_inputs(model: AmorLIPModel, image_size: tuple[int, int] | None, has_mask: bool) -> dict[str, Tensor]:
    vision = model.config.vision_config
    size = getattr(vision, "image_size", None) or image_size
    if size is None:
        raise ValueError(f"vision_config ({vision.model_type}) has no image_size; give the images' height and width.")
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.zeros(2, getattr(vision, "num_channels", 3), height, width, device=model.device)
    tokens = torch.ones(3, 4, dtype=torch.long, device=model.device)
    inputs = {"pixel_values": pixels, "input_ids": tokens}
    return inputs | ({"attention_mask": tokens.clone()} if has_mask else {})


def _trace(encoder: nn.Module, inputs: dict[str, Tensor]) -> ExportedProgram:
    """Return the program of an encoder for any batch size and text length, in the model's dtype and on its device."""
    names = [name for name in inspect.signature(encoder.forward).parameters if name in inputs]
    shapes = {name: dict.fromkeys(AXES[name], Dim.DYNAMIC) for name in names}
    with torch.no_grad():
        return torch.export.export(encoder.eval(), tuple(inputs[name] for name in names), dynamic_shapes=shapes)


def _scales(model: AmorLIPModel) -> dict[str, str]:
    """Return what turns cosines into logits, and how logits become probabilities, as text for a file's metadata."""
    bias = model.logit_bias
    return {
        "logit_scale": repr(model.logit_scale.exp().item()),
        "logit_bias": repr(0.0 if bias is None else bias.item()),
        "probabilities": "softmax" if bias is None else "sigmoid",
    }


def write_config(model: AmorLIPModel, folder: Path, paths: list[Path]) -> None:
    """Write the config.json by which transformers.js chooses the model's class, and softmax or sigmoid."""
    scales = _scales(model)
    config: dict[str, Any] = {
        "model_type": "siglip" if scales["probabilities"] == "sigmoid" else "clip",
        "logit_scale": float(scales["logit_scale"]),
        "logit_bias": float(scales["logit_bias"]),
        "projection_dim": model.config.projection_dim,
    }
    if with_data := {path.name.removesuffix("_data"): 1 for path in paths if path.name.endswith("_data")}:
        config["transformers.js_config"] = {"use_external_data_format": with_data}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
    parser.add_argument("--opset", type=int, default=DEFAULT_OPSET, help="ONNX opset (default: %(default)s)")
    parser.add_argument("--quantize", action="store_true", help="also write ONNX files with 8-bit weights")
    arguments = parser.parse_args()
    if arguments.quantize and arguments.format != "onnx":
        raise UserError(f"--quantize is for ONNX; --format is {arguments.format}.")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of torchvision's operators, which nothing uses
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it prints a traceback for an opset that we refuse
    check_output_folder(arguments.output, arguments.model)
    with as_user_error(ValueError, OSError, ImportError):
        model, processor = load_amorlip("--model", arguments.model)
        if processor is None:
            raise UserError(
                f"--model {arguments.model} has no processor; save it there with processor.save_pretrained."
            )
        paths = export(
            model,
            arguments.output,
            arguments.format,
            _processed_size(processor.image_processor),
            has_mask="attention_mask" in processor.tokenizer.model_input_names,
            opset=arguments.opset,
            quantize=arguments.quantize,
        )
        processor.save_pretrained(arguments.output)
        if arguments.format == "onnx":
            processor.image_processor.save_pretrained(arguments.output)  # transformers.js reads it from its own file
            write_config(model, Path(arguments.output), paths)
    for path in paths:
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
