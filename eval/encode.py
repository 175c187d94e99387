"""Embeddings of many images and texts by any dual encoder of Transformers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torch import Tensor


def encode_images(
    model, processor, images: Iterable[Image.Image], batch_size: int = 256, normalize: bool = True
) -> Tensor:
    """Unit-norm image embeddings [I, d], float32, on the CPU. A batch is made ready while the one before is encoded."""

    ready = processor.image_processor

    def prepare(batch):
        images = [on_white(image) for image in batch]
        if not (ready.do_rescale and ready.do_normalize):
            return ready(images, return_tensors="pt")["pixel_values"]
        # The processor would scale image by image; a whole batch at once takes a third of the time.
        pixels = ready(images, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (ready.image_mean, ready.image_std))
        return pixels.float().mul_(ready.rescale_factor).sub_(mean).div_(std)

    def encode(pixels):
        return model.get_image_features(pixel_values=pixels.to(model.device, model.dtype, non_blocking=True))

    return torch.cat(list(_encode(model, prepare, encode, images, batch_size, normalize)))


def encode_texts(model, processor, texts: Iterable[str], batch_size: int = 256, normalize: bool = True) -> Tensor:
    """Unit-norm text embeddings [T, d], float32, on the CPU."""
    return torch.cat(list(stream_texts(model, processor, texts, batch_size, normalize)))


def stream_texts(
    model, processor, texts: Iterable[str], batch_size: int = 256, normalize: bool = True
) -> Iterator[Tensor]:
    """As `encode_texts`, a batch at a time."""
    # SigLIP was trained on texts padded to its context, without a mask.
    padding = "max_length" if model.config.text_config.model_type.startswith("siglip") else True
    # RoBERTa's tokenizer knows the shorter length, CLIP's may know none, and T5 has no positions to run out of.
    positions = getattr(model.config.text_config, "max_position_embeddings", 1_000_000)
    context = min(positions, processor.tokenizer.model_max_length)

    def prepare(batch):
        return processor.tokenizer(batch, padding=padding, truncation=True, max_length=context, return_tensors="pt")

    def encode(tokens):
        known = ("input_ids", "attention_mask")
        return model.get_text_features(**{name: tokens[name].to(model.device) for name in known if name in tokens})

    yield from _encode(model, prepare, encode, texts, batch_size, normalize)


def on_white(image: Image.Image) -> Image.Image:
    """The image in RGB, with transparency laid on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _encode(model, prepare, encode, inputs: Iterable, batch_size: int, normalize: bool) -> Iterator[Tensor]:
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
                    embed = torch.nn.functional.normalize(embed.float(), dim=-1) if normalize else embed.float()
                yield embed.cpu()
    finally:
        model.train(was_training)


def _batches(inputs: Iterable, batch_size: int) -> Iterator[list]:
    iterator = iter(inputs)
    while batch := list(itertools.islice(iterator, batch_size)):
        yield batch
