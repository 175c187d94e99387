"""Register AmorLIP, or any dual encoder of Transformers, as a model type of CLIP_benchmark.

    python eval/apps/clip_benchmark_models.py eval --model_type amorlip --model outputs/emoji_demo --pretrained "" \\
        --dataset wds/cifar10 --dataset_root data/wds_cifar10 --no_amp --output cifar10.json

This is CLIP_benchmark's own command line with one additional model type. It needs CLIP_benchmark
(`pip install clip-benchmark "numpy<2.4"`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from PIL import Image
from torch import Tensor, nn

from eval.models import load_model
from modeling_amorlip.cli_amorlip import UserError, cli_entry_point
from modeling_amorlip.embedder_amorlip import encode_texts
from modeling_amorlip.images_amorlip import convert_to_rgb


class CLIPBenchmarkModel(nn.Module):
    """Wrap a dual encoder with the two methods that CLIP_benchmark calls."""

    def __init__(self, model: Any, processor: Any):
        super().__init__()
        self.model, self.processor = model, processor

    def encode_image(self, images: Tensor) -> Tensor:
        """Return the embeddings [I, d] of transformed images [I, 3, height, width]."""
        output = self.model.get_image_features(pixel_values=images.to(self.model.dtype))
        return output if isinstance(output, Tensor) else output.pooler_output

    def encode_text(self, texts: list[str]) -> Tensor:
        """Return the embeddings [T, d] of T texts."""
        return encode_texts(self.model, self.processor, texts).to(self.model.device)


class TextBatch(list):
    """Texts in place of the tensor of tokens that CLIP_benchmark moves to a device; the model tokenizes them."""

    def to(self, device: torch.device | str) -> TextBatch:
        """Return the texts themselves."""
        return self


def load_amorlip(
    model_name: str, pretrained: str = "", cache_dir: str | None = None, device: torch.device | str = "cpu"
) -> tuple[CLIPBenchmarkModel, Callable[[Image.Image], Tensor], type[TextBatch]]:
    """Return (model, image transform, tokenizer), as CLIP_benchmark's `load_clip` does.

    Args:
        model_name: folder or Hub repository.
        pretrained: unused, because the folder holds the weights.
        cache_dir: unused, because Transformers has its own cache.
    """
    model, processor = load_model(model_name)

    def transform(image: Image.Image) -> Tensor:
        return processor.image_processor(convert_to_rgb(image), return_tensors="pt")["pixel_values"][0]

    return CLIPBenchmarkModel(model.to(torch.device(device)), processor), transform, TextBatch


def register() -> None:
    """Add `load_amorlip` to CLIP_benchmark as `--model_type amorlip`."""
    from clip_benchmark import models

    models.TYPE2FUNC["amorlip"] = load_amorlip
    models.MODEL_TYPES.append("amorlip")


@cli_entry_point
def main() -> int | None:
    try:
        register()
    except ImportError:
        raise UserError('CLIP_benchmark is not installed: pip install clip-benchmark "numpy<2.4"') from None
    from clip_benchmark.cli import main as run_clip_benchmark

    return run_clip_benchmark()


if __name__ == "__main__":
    sys.exit(main())
