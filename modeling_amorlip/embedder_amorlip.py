"""Embeddings of many images and texts by any dual encoder of Transformers."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from .images_amorlip import preprocess_images
from .pipeline_amorlip import tokenize_texts


T = TypeVar("T")


def encode_images(
    model, processor, images: Iterable[Image.Image], batch_size: int = 256, normalize: bool = True
) -> Tensor:
    """Return image embeddings [I, d], float32, on the CPU, of unit norm unless `normalize` is False.

    The next batch is preprocessed while one is encoded.
    """

    def preprocess(batch: list[Image.Image]) -> Tensor:
        return preprocess_images(processor.image_processor, batch)

    def encode(pixels: Tensor):
        return model.get_image_features(pixel_values=pixels.to(model.device, model.dtype, non_blocking=True))

    return torch.cat(list(_stream(model, preprocess, encode, images, batch_size, normalize)))


def encode_texts(model, processor, texts: Iterable[str], batch_size: int = 256, normalize: bool = True) -> Tensor:
    """Return text embeddings [T, d], float32, on the CPU, of unit norm unless `normalize` is False."""
    return torch.cat(list(stream_texts(model, processor, texts, batch_size, normalize)))


def stream_texts(
    model, processor, texts: Iterable[str], batch_size: int = 256, normalize: bool = True
) -> Iterator[Tensor]:
    """Yield what `encode_texts` returns, batch by batch."""

    def preprocess(batch: list[str]) -> dict[str, Tensor]:
        if wrong := next((text for text in batch if re.search("[\ud800-\udfff]", text)), None):
            raise ValueError(f"The text {wrong!r} is no valid Unicode: it holds half of a character; correct it.")
        tokens = tokenize_texts(processor.tokenizer, model.config.text_config, batch)
        return {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}

    def encode(tokens: dict[str, Tensor]):
        return model.get_text_features(**{name: tensor.to(model.device) for name, tensor in tokens.items()})

    yield from _stream(model, preprocess, encode, texts, batch_size, normalize)


def _stream(
    model,
    preprocess: Callable[[list[T]], Any],
    encode: Callable[[Any], Any],
    inputs: Iterable[T],
    batch_size: int,
    normalize: bool,
) -> Iterator[Tensor]:
    batches = _batches(inputs, batch_size)

    def preprocess_next() -> Any:
        batch = next(batches, None)
        return None if batch is None else preprocess(batch)

    was_training = model.training
    model.eval()
    try:
        with ThreadPoolExecutor(1) as thread:
            # The thread also reads the inputs, at most one batch ahead.
            future = thread.submit(preprocess_next)
            while (batch := future.result()) is not None:
                future = thread.submit(preprocess_next)
                with torch.inference_mode():
                    output = encode(batch)
                    embeds = (output if isinstance(output, Tensor) else output.pooler_output).float()
                    embeds = torch.nn.functional.normalize(embeds, dim=-1) if normalize else embeds
                yield embeds.cpu()
    finally:
        model.train(was_training)


def _batches(inputs: Iterable[T], batch_size: int) -> Iterator[list[T]]:
    iterator = iter(inputs)
    while batch := list(itertools.islice(iterator, batch_size)):
        yield batch


class Embedder:
    """
    The interface of sentence-transformers and mteb (`encode`, `encode_query`, `encode_document`, `similarity`) on a
    dual encoder.

    Args:
        model: folder or name on the Hub, or a dual encoder with get_image_features and get_text_features.
        processor: the model's processor; loaded together with a model that is given by name.
        device: where to encode, e.g. `"cuda"`.
    """

    similarity_fn_name = "cosine"

    def __init__(self, model, processor=None, device: str = "cpu"):
        if isinstance(model, str | os.PathLike):
            processor = processor or AutoProcessor.from_pretrained(model)
            model = AutoModel.from_pretrained(model)
        if processor is None:
            raise ValueError("Embedder needs the model's processor: pass it after the model, or name a folder.")
        self.model, self.processor = model.to(device).eval(), processor

    def encode(
        self,
        inputs: str | Image.Image | Mapping | Iterable,
        batch_size: int = 32,
        normalize_embeddings: bool = True,
        convert_to_tensor: bool = False,
        convert_to_numpy: bool = True,
        **kwargs,
    ) -> np.ndarray | Tensor | list[Tensor]:
        """
        Return embeddings [N, d] of texts and images in their order, float32; [d] for a single input.

        Args:
            inputs: a text, an image or a mapping with one of each under `"text"` and `"image"`; several of these; or
                mteb's batches, mappings with lists under `"text"` and `"image"`. A row with both gets the sum of the
                two embeddings (of the unit-norm ones, normalized again, if `normalize_embeddings`).
            batch_size: texts or images to encode at a time.
            normalize_embeddings: scale embeddings to unit norm.
            convert_to_tensor: return a tensor on the CPU instead of an array.
            convert_to_numpy: if neither this nor `convert_to_tensor` is true, return a list of tensors [d].
            kwargs: ignored: what callers pass to other models (`task_metadata`, `prompt_type`, `show_progress_bar`).

        Raises:
            ValueError: there are no inputs, one is neither a text nor an image, or an option asks for other embeddings.
        """
        _check_options(kwargs, batch_size)
        is_single = isinstance(inputs, str | Image.Image) or isinstance(inputs, Mapping) and not _is_batch(inputs)
        is_several = isinstance(inputs, Iterable) and not isinstance(inputs, str | Image.Image | Mapping)
        entries: Any = inputs if is_several else [inputs]
        rows = [row for entry in entries for row in _rows(entry)]
        if not rows:
            raise ValueError("encode was given nothing to encode.")
        embeds = self._encode_rows(rows, batch_size, normalize_embeddings)
        embeds = embeds[0] if is_single else embeds
        if convert_to_tensor or (is_single and not convert_to_numpy):
            return embeds
        return embeds.numpy() if convert_to_numpy else list(embeds)

    encode_query = encode_document = encode

    def _encode_rows(self, rows: list[_Row], batch_size: int, normalize: bool) -> Tensor:
        total: Tensor | None = None
        for name, encode in (("text", encode_texts), ("image", encode_images)):
            places = [place for place, row in enumerate(rows) if getattr(row, name) is not None]
            if places:
                values = [getattr(rows[place], name) for place in places]
                embeds = encode(self.model, self.processor, values, batch_size, normalize)
                total = embeds.new_zeros(len(rows), embeds.shape[1]) if total is None else total
                total[places] += embeds
        assert total is not None  # every row has a text or an image
        fused = [place for place, row in enumerate(rows) if row.text is not None and row.image is not None]
        if normalize and fused:
            total[fused] = torch.nn.functional.normalize(total[fused], dim=-1)
        return total

    @staticmethod
    def similarity(first: np.ndarray | Tensor, second: np.ndarray | Tensor) -> Tensor:
        """Return cosines [N, M] of embeddings [N, d] and [M, d]."""
        return _unit_norm(first) @ _unit_norm(second).T

    @staticmethod
    def similarity_pairwise(first: np.ndarray | Tensor, second: np.ndarray | Tensor) -> Tensor:
        """Return cosines [N] of embeddings [N, d] and [N, d], row by row."""
        return (_unit_norm(first) * _unit_norm(second)).sum(-1)

    @property
    def model_card_data(self) -> _NoCard:
        """Where sentence-transformers' evaluators record their results."""
        return _NoCard()

    @property
    def mteb_model_meta(self):
        """What mteb, which has to be installed, records of the model in its results."""
        from mteb.models import ModelMeta

        owner, _, name = self.model.name_or_path.rstrip("/").rpartition("/")
        is_local = not owner or owner.count("/") or owner.startswith(".")
        meta = {"name": f"{'local' if is_local else owner}/{name}", "modalities": ["image", "text"]}
        return ModelMeta.create_empty(meta | {"revision": getattr(self.model.config, "_commit_hash", None) or "local"})


class _NoCard:
    def set_evaluation_metrics(self, *results) -> None:
        """Keep nothing: an evaluator returns its results as well."""


# Options of sentence-transformers' `encode` that change embeddings, with the values that leave them as they are.
FIXED_OPTIONS = {
    "precision": (None, "float32"),
    "output_value": ("sentence_embedding",),
    "truncate_dim": (None,),
    "prompt": (None, ""),
}


def _check_options(options: dict[str, Any], batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more.")
    for name, values in FIXED_OPTIONS.items():
        if name in options and options[name] not in values:
            raise ValueError(f"{name} is {options[name]!r}, and encode has {values[0]!r} alone: change the embeddings.")


class _Row(NamedTuple):
    """What one embedding is made of: a text, an image or both."""

    text: str | None = None
    image: Image.Image | None = None


def _rows(entry: object) -> list[_Row]:
    """Return the rows of one input: a text, an image, a mapping of one of each, or a batch of mteb."""
    if isinstance(entry, str):
        return [_Row(text=entry)]
    if isinstance(entry, Image.Image):
        return [_Row(image=entry)]
    if not isinstance(entry, Mapping):
        raise ValueError(f"encode takes texts, PIL images and mappings of them, and was given {type(entry).__name__}.")
    modalities = {name: entry[name] for name in ("text", "image") if name in entry}
    # A batch comes with the other columns of its data set; a single row does not, so there they are mistakes.
    unknown = sorted(map(str, set(entry) - set(modalities)))
    if not modalities or unknown and not _is_batch(entry) or {"audio", "video"} & set(unknown):
        raise ValueError(
            f"A row to encode has 'text', 'image' or both, and was given {', '.join(unknown) or 'neither'}."
        )
    columns = {name: list(v) if _is_batch(entry) else [v] for name, v in modalities.items()}
    if len(set(map(len, columns.values()))) > 1:
        raise ValueError(f"A batch has {len(columns['text'])} texts and {len(columns['image'])} images; give as many.")
    rows = [_Row(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]
    for row in rows:
        _check_types(row)
    return rows


def _is_batch(entry: Mapping) -> bool:
    values = [entry[name] for name in ("text", "image") if name in entry]
    return any(not isinstance(value, str | Image.Image) and isinstance(value, Iterable) for value in values)


def _check_types(row: _Row) -> None:
    if row == _Row():
        raise ValueError("A row to encode has 'text', 'image' or both, and was given NoneType.")
    for name, value, kind in (("text", row.text, str), ("image", row.image, Image.Image)):
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name!r} of a row to encode was given {type(value).__name__}, not {kind.__name__}.")


def _unit_norm(embeds: np.ndarray | Tensor) -> Tensor:
    return torch.nn.functional.normalize(torch.atleast_2d(torch.as_tensor(embeds)), dim=-1)
