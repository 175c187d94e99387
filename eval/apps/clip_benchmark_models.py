"""AmorLIP, or any dual encoder of Transformers, as a model type of CLIP_benchmark (`pip install clip-benchmark`).

    python eval/apps/clip_benchmark_models.py eval --model_type amorlip --model outputs/emoji_demo --pretrained "" \\
        --dataset wds/cifar10 --dataset_root data/wds_cifar10 --no_amp --output cifar10.json

is CLIP_benchmark's own command with one model type more (`register()`). CLIP_benchmark 1.6 needs numpy below 2.4.
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from PIL import Image
from torch import Tensor, nn

from eval.models import load_model
from modeling_amorlip.embedder_amorlip import encode_texts
from modeling_amorlip.images_amorlip import convert_to_rgb


class CLIPBenchmarkModel(nn.Module):
    """The two methods that CLIP_benchmark calls."""

    def __init__(self, model, processor):
        super().__init__()
        self.model, self.processor = model, processor

    def encode_image(self, images: Tensor) -> Tensor:
        """[I, 3, height, width], as the transform leaves them -> [I, d]."""
        output = self.model.get_image_features(pixel_values=images.to(self.model.dtype))
        return output if isinstance(output, Tensor) else output.pooler_output

    def encode_text(self, texts: list[str]) -> Tensor:
        """T texts -> [T, d]."""
        return encode_texts(self.model, self.processor, texts).to(self.model.device)


class Texts(list):
    """Texts that stand where CLIP_benchmark expects a tensor of tokens to move to a device; the model tokenizes."""

    def to(self, device) -> Texts:
        return self


def load_amorlip(model_name: str, pretrained: str = "", cache_dir: str | None = None, device="cpu"):
    """(model, transform of an image, tokenizer) as CLIP_benchmark's `load_clip` returns them.

    Args:
        model_name: folder or Hub repository. pretrained, cache_dir: not used, the folder holds the weights.
    """
    model, processor = load_model(model_name)

    def transform(image: Image.Image) -> Tensor:
        return processor.image_processor(convert_to_rgb(image), return_tensors="pt")["pixel_values"][0]

    return CLIPBenchmarkModel(model.to(torch.device(device)), processor), transform, Texts


def register() -> None:
    """Makes `load_amorlip` CLIP_benchmark's `--model_type amorlip`."""
    from clip_benchmark import models

    models.TYPE2FUNC["amorlip"] = load_amorlip
    models.MODEL_TYPES.append("amorlip")


if __name__ == "__main__":
    register()
    from clip_benchmark.cli import main

    sys.exit(main())
