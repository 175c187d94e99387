"""Embeddings of many images and texts by any dual encoder of Transformers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def encode_images(model, processor, images: Iterable[Image.Image], batch_size: int = 256) -> Tensor:
    """Unit-norm image embeddings [I, d], float32, on the CPU. A batch is made ready while the one before is encoded."""

    def prepare(batch):
        return pixels_for(processor.image_processor, batch)

    def encode(pixels):
        return model.get_image_features(pixel_values=pixels.to(model.device, model.dtype, non_blocking=True))

    return torch.cat(list(_encode(model, prepare, encode, images, batch_size)))


def pixels_for(image_processor, images: list[Image.Image]) -> Tensor:
    """What an image processor makes of images, float32 [N, 3, H, W]; sooner than it would itself."""
    images = [on_white(image) for image in images]
    if not (image_processor.do_rescale and image_processor.do_normalize):
        return image_processor(images, return_tensors="pt")["pixel_values"]
    # It would scale image by image, and resize to the size that they have already: five times the work.
    if all(_has_final_size(image, image_processor) for image in images):
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    else:
        pixels = image_processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    factor = image_processor.rescale_factor
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (image_processor.image_mean, image_processor.image_std))
    return pixels.sub(mean / factor).mul_(factor / std)


def _has_final_size(image: Image.Image, image_processor) -> bool:
    """Whether an image processor would leave an RGB image's pixels as they are."""
    resized = dict(image_processor.size) if image_processor.do_resize else {}
    cropped = dict(image_processor.crop_size) if getattr(image_processor, "do_center_crop", False) else {}
    known = {"shortest_edge": min(image.size), "height": image.height, "width": image.width}
    return all(known.get(name) == value for name, value in [*resized.items(), *cropped.items()])


def encode_texts(model, processor, texts: Iterable[str], batch_size: int = 256) -> Tensor:
    """Unit-norm text embeddings [T, d], float32, on the CPU."""
    return torch.cat(list(stream_texts(model, processor, texts, batch_size)))


def stream_texts(model, processor, texts: Iterable[str], batch_size: int = 256) -> Iterator[Tensor]:
    """As `encode_texts`, a batch at a time."""
    text_config = model.config.text_config
    # SigLIP was trained on texts padded to its context, without a mask; its text tower may be part of our model too.
    padding = "max_length" if getattr(text_config, "model_type", "").startswith("siglip") else True
    context = text_config.max_position_embeddings

    def prepare(batch):
        return processor.tokenizer(batch, padding=padding, truncation=True, max_length=context, return_tensors="pt")

    def encode(tokens):
        known = ("input_ids", "attention_mask")
        return model.get_text_features(**{name: tokens[name].to(model.device) for name in known if name in tokens})

    yield from _encode(model, prepare, encode, texts, batch_size)


def on_white(image: Image.Image) -> Image.Image:
    """The image in RGB, with transparency laid on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _encode(model, prepare, encode, inputs: Iterable, batch_size: int) -> Iterator[Tensor]:
    was_training = model.training
    model.eval()
    batches = _batches(inputs, batch_size)
    try:
        with ThreadPoolExecutor(1) as thread:
            # Inputs are read in the thread too, which keeps at most one batch ahead.
            coming = thread.submit(lambda: (batch := next(batches, None)) and prepare(batch))
            while (ready := coming.result()) is not None:
                coming = thread.submit(lambda: (batch := next(batches, None)) and prepare(batch))
                with torch.inference_mode():
                    output = encode(ready)
                    embed = output if isinstance(output, Tensor) else output.pooler_output
                    embed = torch.nn.functional.normalize(embed.float(), dim=-1).cpu()
                yield embed
    finally:
        model.train(was_training)


def _batches(inputs: Iterable, batch_size: int) -> Iterator[list]:
    iterator = iter(inputs)
    while batch := list(itertools.islice(iterator, batch_size)):
        yield batch
