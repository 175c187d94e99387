"""Embeddings of many images and texts by any dual encoder of Transformers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from PIL import Image
from torch import Tensor


def encode_images(model, processor, images: Iterable[Image.Image], batch_size: int = 256) -> Tensor:
    """Unit-norm image embeddings [I, d], float32, on the CPU."""

    def encode(batch):
        pixels = processor.image_processor([on_white(image) for image in batch], return_tensors="pt")["pixel_values"]
        return model.get_image_features(pixel_values=pixels.to(model.device))

    return _encode(model, encode, images, batch_size)


def encode_texts(model, processor, texts: Iterable[str], batch_size: int = 256) -> Tensor:
    """Unit-norm text embeddings [T, d], float32, on the CPU."""

    def encode(batch):
        tokens = processor.tokenizer(batch, padding=True, truncation=True, return_tensors="pt").to(model.device)
        return model.get_text_features(**{key: tokens[key] for key in ("input_ids", "attention_mask")})

    return _encode(model, encode, texts, batch_size)


def on_white(image: Image.Image) -> Image.Image:
    """The image in RGB, with transparency laid on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


@torch.inference_mode()
def _encode(model, encode, inputs: Iterable, batch_size: int) -> Tensor:
    was_training = model.training
    model.eval()
    try:
        embeds = []
        for batch in _batches(inputs, batch_size):
            output = encode(batch)
            embed = output if isinstance(output, Tensor) else output.pooler_output
            embeds.append(torch.nn.functional.normalize(embed.float(), dim=-1).cpu())
        return torch.cat(embeds)
    finally:
        model.train(was_training)


def _batches(inputs: Iterable, batch_size: int) -> Iterator[list]:
    iterator = iter(inputs)
    while batch := list(itertools.islice(iterator, batch_size)):
        yield batch
