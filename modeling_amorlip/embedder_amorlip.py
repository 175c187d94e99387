"""Embeddings of many images and texts by any dual encoder of Transformers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from .images_amorlip import preprocess_images


def encode_images(
    model, processor, images: Iterable[Image.Image], batch_size: int = 256, normalize: bool = True
) -> Tensor:
    """Image embeddings [I, d], float32, on the CPU, of unit norm unless `normalize` is False.

    A batch is made ready while the one before is encoded.
    """

    def prepare(batch):
        return preprocess_images(processor.image_processor, batch)

    def encode(pixels):
        return model.get_image_features(pixel_values=pixels.to(model.device, model.dtype, non_blocking=True))

    return torch.cat(list(_encode(model, prepare, encode, images, batch_size, normalize)))


def encode_texts(model, processor, texts: Iterable[str], batch_size: int = 256, normalize: bool = True) -> Tensor:
    """Text embeddings [T, d], float32, on the CPU, of unit norm unless `normalize` is False."""
    return torch.cat(list(stream_texts(model, processor, texts, batch_size, normalize)))


def stream_texts(
    model, processor, texts: Iterable[str], batch_size: int = 256, normalize: bool = True
) -> Iterator[Tensor]:
    """As `encode_texts`, a batch at a time."""
    # SigLIP was trained on texts padded to its context, without a mask.
    text_config, tokenizer = model.config.text_config, processor.tokenizer
    padding = "max_length" if getattr(text_config, "model_type", "").startswith("siglip") else True
    # RoBERTa's tokenizer knows the shorter length, CLIP's may know none, and T5 has no positions to run out of.
    positions = getattr(text_config, "max_position_embeddings", 1_000_000)
    context = min(positions, getattr(tokenizer, "model_max_length", positions))

    def prepare(batch):
        return tokenizer(batch, padding=padding, truncation=True, max_length=context, return_tensors="pt")

    def encode(tokens):
        known = ("input_ids", "attention_mask")
        return model.get_text_features(**{name: tokens[name].to(model.device) for name in known if name in tokens})

    yield from _encode(model, prepare, encode, texts, batch_size, normalize)


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


class Embedder:
    """
    Args:
        model: folder or name on the Hub, or a dual encoder with get_image_features and get_text_features.
        processor: the model's processor; loaded with a model that is named.
        device: where to encode, e.g. `"cuda"`.
    """

    def __init__(self, model, processor=None, device: str = "cpu"):
        if isinstance(model, str | os.PathLike):
            processor = processor or AutoProcessor.from_pretrained(model)
            model = AutoModel.from_pretrained(model)
        self.model, self.processor = model.to(device).eval(), processor

    def encode(
        self,
        inputs: str | Image.Image | Iterable,
        batch_size: int = 32,
        normalize_embeddings: bool = True,
        convert_to_tensor: bool = False,
        **kwargs,
    ) -> np.ndarray | Tensor:
        """
        Embeddings [N, d] of texts and images in their order, float32; [d] for one that is not in a list.

        Args:
            inputs: a text or an image, several of them, or mteb's batches: mappings with a list under `"image"` or
                `"text"`.
            batch_size: texts or images to encode at a time.
            normalize_embeddings: to unit norm.
            convert_to_tensor: return a tensor on the CPU instead of an array.
            kwargs: what callers pass on to other models (`task_metadata`, `prompt_type`, `show_progress_bar`, ...);
                nothing here depends on it.

        Raises:
            ValueError: an input is neither text nor image, or there is none.
        """
        single = isinstance(inputs, str | Image.Image)
        items = [inputs] if single else [item for entry in inputs for item in _items(entry)]
        kinds = {str: encode_texts, Image.Image: encode_images}
        rows, embeds = [], []
        for kind, encode in kinds.items():
            mine = [row for row, item in enumerate(items) if isinstance(item, kind)]
            if mine:
                chosen = [items[row] for row in mine]
                embeds.append(encode(self.model, self.processor, chosen, batch_size, normalize_embeddings))
                rows += mine
        if not items or len(rows) < len(items):
            other = next((type(item).__name__ for item in items if not isinstance(item, tuple(kinds))), "nothing")
            raise ValueError(f"encode takes texts and PIL images, and was given {other}.")
        embeds = torch.cat(embeds)[torch.tensor(rows).argsort()]
        embeds = embeds[0] if single else embeds
        return embeds if convert_to_tensor else embeds.numpy()

    @staticmethod
    def similarity(first: np.ndarray | Tensor, second: np.ndarray | Tensor) -> Tensor:
        """Cosines [N, M] of embeddings [N, d] and [M, d]."""
        return _unit_norm(first) @ _unit_norm(second).T

    @staticmethod
    def similarity_pairwise(first: np.ndarray | Tensor, second: np.ndarray | Tensor) -> Tensor:
        """Cosines [N] of embeddings [N, d] and [N, d], row by row."""
        return (_unit_norm(first) * _unit_norm(second)).sum(-1)

    @property
    def mteb_model_meta(self):
        """What mteb, which has to be installed, notes of the model in its results."""
        from mteb.models import ModelMeta

        owner, _, name = self.model.name_or_path.rstrip("/").rpartition("/")
        local = not owner or owner.count("/") or owner.startswith(".")
        about = {"name": f"{'local' if local else owner}/{name}", "modalities": ["image", "text"]}
        return ModelMeta.create_empty(about | {"revision": getattr(self.model.config, "_commit_hash", None) or "local"})


def _unit_norm(embeds: np.ndarray | Tensor) -> Tensor:
    return torch.nn.functional.normalize(torch.atleast_2d(torch.as_tensor(embeds)), dim=-1)


def _items(entry) -> list:
    return list(entry["image"] if "image" in entry else entry["text"]) if isinstance(entry, dict) else [entry]
