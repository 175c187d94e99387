"""Embeddings of a task's samples: read and preprocessed by workers, encoded batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from eval.data import TaskData
from eval.samples import Sample, describe_image_error
from eval.sharding import ProcessShard
from modeling_amorlip.cli_amorlip import UserError
from modeling_amorlip.embedder_amorlip import stream_texts
from modeling_amorlip.images_amorlip import preprocess_images


MAX_CANDIDATES = 12  # images of an instance of WinoGAViL


@dataclass
class Batch:
    """Samples without their images, and the images' pixels [I, 3, H, W], None where no sample could be read."""

    positions: list[int] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    image_counts: list[int] = field(default_factory=list)
    pixel_values: Tensor | None = None
    unreadable: list[str] = field(default_factory=list)


class BatchReader(IterableDataset):
    """Batches of one process, or of one of its workers, decoded and preprocessed."""

    def __init__(self, data: TaskData, image_processor: Any, batch_size: int, shard: ProcessShard):
        self.data, self.image_processor, self.batch_size, self.shard = data, image_processor, batch_size, shard

    def __iter__(self) -> Iterator[Batch | UserError]:
        worker = get_worker_info()
        workers, index = (worker.num_workers, worker.id) if worker else (1, 0)
        reader, readers = self.shard.rank * workers + index, self.shard.processes * workers
        try:
            for samples in self.data.batches(self.batch_size, reader, readers):
                yield self._prepare(samples)
        except UserError as error:  # raised in a worker, its message would drown in the worker's traceback
            yield error

    def _prepare(self, samples: list[tuple[int, Sample]]) -> Batch:
        batch = Batch()
        images: list[Image.Image] = []
        for position, sample in samples:
            try:
                decoded = sample.decode()
                if self.data.task.kind == "retrieval" and not sample.captions:
                    raise UserError("it has no caption")
            except Exception as error:  # Pillow raises many types
                batch.unreadable.append(f"{sample.key} ({describe_image_error(error)})")
                continue
            images += decoded
            batch.positions.append(position)
            batch.samples.append(replace(sample, images=[]))
            batch.image_counts.append(len(decoded))
        if images:
            batch.pixel_values = preprocess_images(self.image_processor, images)
        return batch


@dataclass(frozen=True)
class Encoder:
    """A dual encoder, and how this process encodes its part of the samples.

    Args:
        model: Model with `get_image_features` and `get_text_features`.
        processor: Its processor, with `image_processor` and `tokenizer`.
        batch_size: Samples or texts encoded at a time.
        num_workers: Processes that read and preprocess images; 0 uses a thread.
        dtype: Type to compute in under autocast; None leaves the model's own.
        shard: This process's rank.
    """

    model: Any
    processor: Any
    batch_size: int = 256
    num_workers: int = 0
    dtype: torch.dtype | None = None
    shard: ProcessShard = ProcessShard()

    def image_batches(self, data: TaskData) -> Iterator[tuple[Batch, Tensor]]:
        """Yield this process's batches without their pixels, and the unit-norm image embeddings [I, d] of each."""
        per_batch = self.batch_size if data.task.kind != "winogavil" else max(1, self.batch_size // MAX_CANDIDATES)
        reader = BatchReader(data, self.processor.image_processor, per_batch, self.shard)
        batches: Iterator[Batch | UserError]
        if self.num_workers:
            batches = iter(DataLoader(reader, batch_size=None, num_workers=self.num_workers))
        else:
            batches = _prefetch(iter(reader))
        total = data.task.size and data.task.size // self.shard.processes
        with tqdm(desc=data.task.title, total=total, unit="img", leave=False, disable=self.shard.rank > 0) as progress:
            for batch in batches:
                if isinstance(batch, UserError):
                    raise batch
                if batch.pixel_values is not None:
                    embeds = self._encode_pixels(batch.pixel_values)
                    yield replace(batch, pixel_values=None), embeds
                elif batch.unreadable:
                    yield batch, torch.zeros(0, 0)
                progress.update(len(batch.samples))

    def texts(self, texts: list[str]) -> Tensor:
        """Return the unit-norm embeddings [T, d] of texts."""
        with self.autocast():
            return torch.cat(list(stream_texts(self.model, self.processor, texts, self.batch_size)))

    def autocast(self) -> AbstractContextManager:
        """Return a context that computes in `dtype`."""
        return nullcontext() if self.dtype is None else torch.autocast(self.model.device.type, self.dtype)

    @torch.inference_mode()
    def _encode_pixels(self, pixel_values: Tensor) -> Tensor:
        pixel_values = pixel_values.to(self.model.device, self.model.dtype, non_blocking=True)
        with self.autocast():
            output = self.model.get_image_features(pixel_values=pixel_values)
        embeds = output if isinstance(output, Tensor) else output.pooler_output
        return torch.nn.functional.normalize(embeds.float(), dim=-1).cpu()


def _prefetch(batches: Iterator[Batch | UserError]) -> Iterator[Batch | UserError]:
    """Yield batches, while a thread reads the one after."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


@dataclass
class EncodedSamples:
    """Embeddings of samples with what their task knows of them.

    Args:
        positions: [N], see `eval.data.TaskData`.
        image_embeds: [I, d], unit norm, the images of a sample beside each other.
        image_counts: [N], images per sample.
        labels: [N], class numbers or -1.
        metadata: [N, m], float64; m is 0 for data without metadata.
        right_images: [I], 1 for an image that is an association of its instance of WinoGAViL.
        text_embeds: [T, d], unit norm, the texts of a sample beside each other.
        text_counts: [N], texts per sample.
        unreadable: Keys of samples that were left out, with the reason.
    """

    positions: Tensor
    image_embeds: Tensor
    image_counts: Tensor
    labels: Tensor
    metadata: Tensor
    right_images: Tensor
    text_embeds: Tensor
    text_counts: Tensor
    unreadable: list[str]

    def __len__(self) -> int:
        return len(self.positions)

    def gather(self, shard: ProcessShard) -> EncodedSamples:
        """Return the samples of all processes, in the order of their positions."""
        positions = shard.gather(self.positions)
        order = positions.argsort()
        image_counts, text_counts = shard.gather(self.image_counts), shard.gather(self.text_counts)
        image_order, text_order = _ragged_order(image_counts, order), _ragged_order(text_counts, order)
        return EncodedSamples(
            positions=positions[order],
            image_embeds=shard.gather(self.image_embeds)[image_order],
            image_counts=image_counts[order],
            labels=shard.gather(self.labels)[order],
            metadata=shard.gather(self.metadata)[order],
            right_images=shard.gather(self.right_images)[image_order],
            text_embeds=shard.gather(self.text_embeds)[text_order],
            text_counts=text_counts[order],
            unreadable=sorted(shard.gather_objects(self.unreadable)),
        )


def _ragged_order(counts: Tensor, order: Tensor) -> Tensor:
    """Return the order of rows that moves whole groups of rows, of `counts` [N] each, to `order` [N]."""
    starts = counts.cumsum(0) - counts
    counts = counts[order]
    offsets = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return starts[order].repeat_interleave(counts) + offsets


def encode_samples(encoder: Encoder, data: TaskData) -> EncodedSamples:
    """Return all samples of a task, encoded by all processes together.

    Captions and cues are encoded with the images of their batch, so a text's embedding does not depend on the number of
    processes either.

    Raises:
        UserError: No sample can be read.
    """
    with encoder.shard.agreement():
        batches, image_embeds, text_embeds = [], [torch.zeros(0, 0)], [torch.zeros(0, 0)]
        for batch, embeds in encoder.image_batches(data):
            batches.append(batch)
            image_embeds.append(embeds)
            if texts := [text for sample in batch.samples for text in sample.captions]:
                text_embeds.append(encoder.texts(texts))
        local = _concatenate(batches, image_embeds, text_embeds)
    samples = local.gather(encoder.shard)
    if not len(samples):
        examples = "; ".join(samples.unreadable[:3]) or "there are none"
        raise UserError(f"Task {data.task.name}: none of its samples can be read: {examples}.")
    return samples


def _concatenate(batches: list[Batch], image_embeds: list[Tensor], text_embeds: list[Tensor]) -> EncodedSamples:
    samples = [sample for batch in batches for sample in batch.samples]
    counts = [count for batch in batches for count in batch.image_counts]
    right_images = [int(i in s.associations) for s, count in zip(samples, counts, strict=True) for i in range(count)]
    rows = [[] if s.metadata is None else s.metadata.tolist() for s in samples]
    width = len(rows[0]) if rows else 0
    if other := next((s for s, row in zip(samples, rows, strict=True) if len(row) != width), None):
        raise UserError(
            f"{other.key}: its metadata is not of {width} numbers, as {samples[0].key}'s; give all as many."
        )
    metadata = torch.tensor(rows, dtype=torch.float64).view(len(samples), width)
    return EncodedSamples(
        positions=_int64([position for batch in batches for position in batch.positions]),
        image_embeds=_stack(image_embeds),
        image_counts=_int64(counts),
        labels=_int64([sample.label for sample in samples]),
        metadata=metadata,
        right_images=_int64(right_images),
        text_embeds=_stack(text_embeds),
        text_counts=_int64([len(sample.captions) for sample in samples]),
        unreadable=[name for batch in batches for name in batch.unreadable],
    )


def _int64(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _stack(parts: list[Tensor]) -> Tensor:
    """Concatenate embeddings [n, d], some of which are empty and know no width."""
    filled = [part for part in parts if len(part)]
    return torch.cat(filled) if filled else torch.zeros(0, 0)
