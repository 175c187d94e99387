"""From a source of image-text pairs to batches, in an order and with augmentations that the seed alone decides.

The path of a sample: `EpochOrder` puts an epoch's pairs in order; `PairSampler` divides it into global batches and
gives every process its share; `PairDataset` decodes one image, crops, resizes and augments it and draws one caption,
with a generator seeded by (seed, epoch, index); `Collator` stacks images as uint8 and tokenizes captions, padded to the
longest of the batch. Since nothing depends on what was drawn before, a run continues at any batch by starting the
sampler there, and neither the number of workers nor that of processes changes a sample.

A pair that cannot be used is listed, and another, drawn by the same seed, stands in for it, so that batches stay full.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from eval.errors import UserError

from .arguments import PretrainArguments
from .decoding import augment, open_image
from .sources import Mixture


LONGEST_CAPTION = 100_000
MOST_SUBSTITUTES = 100


class EpochOrder:
    """epoch -> the indices of its pairs, in order: int array [len(self)].

    `shuffle` "samples" mixes all pairs; "shards" puts whole shards in random order and mixes pairs within
    `shuffle_buffer`, which reads files nearly from beginning to end; "none" leaves them as they lie. With
    `samples_per_epoch` or weights each source is gone through again and again, and an epoch is that many pairs of it.

    Args:
        left_out: indices that never come.
    """

    def __init__(self, pairs: Mixture, arguments: PretrainArguments, left_out: np.ndarray | tuple = ()):
        self.arguments, start = arguments, 0
        self.sources = []  # of each source its shards, as ranges of indices
        for part in pairs.parts:
            ends = start + np.cumsum([0, *part.shard_sizes])
            shards = [np.arange(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
            self.sources.append([np.setdiff1d(shard, left_out, assume_unique=True) for shard in shards])
            start = int(ends[-1])
        sizes = [sum(map(len, shards)) for shards in self.sources]
        self.length, self.counts = sum(sizes), None
        if arguments.samples_per_epoch or arguments.train_data_weights:
            shares = np.array(arguments.train_data_weights or sizes, float)
            cuts = np.cumsum(shares / shares.sum()) * (arguments.samples_per_epoch or self.length)
            self.counts = np.diff(np.rint(cuts).astype(int), prepend=0)
            self.length = int(self.counts.sum())

    def __len__(self) -> int:
        return self.length

    def __call__(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self.arguments.seed, epoch])
        if self.counts is None:
            return self._pass([shard for shards in self.sources for shard in shards], generator)
        parts = []
        for number, (shards, count) in enumerate(zip(self.sources, self.counts, strict=True)):
            size = sum(map(len, shards))
            first, skipped = divmod(epoch * int(count), size)
            passes = range(first, first + -(-(skipped + int(count)) // size))
            seeds = ([self.arguments.seed, 1 + number, p] for p in passes)
            parts.append(
                np.concatenate([self._pass(shards, np.random.default_rng(seed)) for seed in seeds] or [shards[0][:0]])[
                    skipped : skipped + count
                ]
            )
        order = np.concatenate(parts)
        return order if self.arguments.shuffle == "none" else generator.permutation(order)

    def _pass(self, shards: list[np.ndarray], generator: np.random.Generator) -> np.ndarray:
        if self.arguments.shuffle == "shards":
            shards = [shards[i] for i in generator.permutation(len(shards))]
        order = np.concatenate(shards)
        if self.arguments.shuffle == "samples":
            return generator.permutation(order)
        if self.arguments.shuffle == "shards":
            window = np.arange(len(order)) // self.arguments.shuffle_buffer
            return order[np.argsort(window + generator.random(len(order)))]
        return order


class PairSampler(Sampler):
    """Yields this process's share of every global batch as lists of (epoch, index), endlessly from `start_step`.

    An epoch drops what does not fill a batch. Pairs with an equal `groups` value are kept out of each other's batches
    as far as that is possible.

    Args:
        order: epoch -> indices [length].
    """

    def __init__(
        self, order: Callable[[int], np.ndarray], length, batch_size, num_processes, process_index, groups=None,
        start_step=0,
    ):  # fmt: skip
        self.order, self.batch_size, self.groups = order, batch_size, groups
        self.global_batch_size = batch_size * num_processes
        self.share = slice(process_index * batch_size, (process_index + 1) * batch_size)
        self.steps_per_epoch = length // self.global_batch_size
        self.start_step = start_step
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{length} pairs do not fill one batch of {self.global_batch_size} "
                f"({batch_size} x {num_processes} processes): lower per_device_train_batch_size."
            )

    def batches(self, epoch: int) -> Iterator[list[int]]:
        """The epoch's global batches."""
        order, size = self.order(epoch), self.global_batch_size
        if self.groups is None:
            for i in range(self.steps_per_epoch):
                yield order[i * size : (i + 1) * size].tolist()
            return
        waiting = deque(order.tolist())
        for _ in range(self.steps_per_epoch):
            batch, met, deferred = [], set(), []
            while waiting and len(batch) < size:
                index = waiting.popleft()
                if self.groups[index] in met:
                    deferred.append(index)
                else:
                    met.add(self.groups[index])
                    batch.append(index)
            shortfall = size - len(batch)
            batch += deferred[:shortfall]
            waiting.extendleft(reversed(deferred[shortfall:]))
            yield batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, position = divmod(self.start_step, self.steps_per_epoch)
        while True:
            for i, batch in enumerate(self.batches(epoch)):
                if i >= position:
                    yield [(epoch, index) for index in batch[self.share]]
            epoch, position = epoch + 1, 0


class PairDataset(torch.utils.data.Dataset):
    """(epoch, index) -> (image uint8 [3, size, size], caption, index, [pairs that could not be used])."""

    def __init__(self, pairs: Mixture, arguments: PretrainArguments, image_size: int):
        self.pairs, self.arguments, self.image_size = pairs, arguments, image_size
        self.augmentation = arguments.parsed_augmentation

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        substitutes, bad = random.Random(f"{self.arguments.seed}/{epoch}/{index}/substitute"), []
        for _ in range(MOST_SUBSTITUTES):
            try:
                pixels, caption = self._load(epoch, index)
                return pixels, caption, index, bad
            except Exception as error:  # files can be wrong in any way
                name, file = self.pairs.where(index)
                reason = " ".join(f"{error}".split()) or "damaged"
                bad.append({"key": name, "shard": file, "cause": type(error).__name__, "reason": reason[:300]})
                index = substitutes.randrange(len(self.pairs))
        return torch.empty(0), "", index, bad  # so many in a row are past every limit

    def _load(self, epoch: int, index: int) -> tuple[torch.Tensor, str]:
        generator = random.Random(f"{self.arguments.seed}/{epoch}/{index}")
        row = self.pairs[index]
        image = open_image(row[self.arguments.image_column], self.arguments.max_image_pixels)
        image = augment(image, self.image_size, self.augmentation, generator)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), self._caption(row, generator)

    def _caption(self, row: dict, generator: random.Random) -> str:
        arguments = self.arguments
        alternatives = row.get(arguments.alternative_captions_column)
        columns = [arguments.caption_column, *arguments.further_caption_columns]
        caption = generator.choice(alternatives) if alternatives else row.get(
            generator.choice(columns) if len(columns) > 1 else columns[0]
        )  # fmt: skip
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"the caption is {str(caption)[:50]!r}; it must be text that is not empty")
        if len(caption) > LONGEST_CAPTION:
            raise ValueError(f"the caption has {len(caption)} characters")
        keywords = row.get(arguments.keywords_column)
        if keywords and generator.random() < arguments.keywords_probability:
            parts = [caption, *generator.sample(keywords, k=min(len(keywords), generator.randint(1, 3)))]
            generator.shuffle(parts)
            caption = ", ".join(parts)
        return caption


class Collator:
    """Samples -> {pixel_values uint8 [N, 3, H, W], input_ids, attention_mask [N, longest], lengths, sample_ids [N]}.

    `bad_samples` stands beside them, and nothing else when a pair could not even be replaced. Texts are padded to the
    longest of the batch, rounded up to `multiple`, or to `max_length` when that is -1; `lengths` are what each would be
    padded to by itself.
    """

    def __init__(self, tokenizer, max_length: int, multiple: int = 1):
        self.tokenizer, self.max_length, self.multiple = tokenizer, max_length, multiple

    def __call__(self, samples):
        images, captions, indices, bad = zip(*samples, strict=True)
        bad_samples = [entry for entries in bad for entry in entries]
        if any(image.numel() == 0 for image in images):
            return {"bad_samples": bad_samples}
        text = self.tokenizer(list(captions), truncation=True, max_length=self.max_length)
        lengths = [self._padded(len(tokens)) for tokens in text["input_ids"]]
        text = self.tokenizer.pad(
            text, padding="max_length", max_length=max(lengths), padding_side="right", return_tensors="pt"
        )
        return {
            "pixel_values": torch.stack(images),
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"],
            "lengths": lengths,
            "sample_ids": torch.tensor(indices),
            "bad_samples": bad_samples,
        }

    def _padded(self, length: int) -> int:
        if self.multiple < 0:
            return self.max_length
        return min(math.ceil(length / self.multiple) * self.multiple, self.max_length)


def make_dataloader(pairs, arguments, image_size, collator: Collator, sampler: PairSampler) -> DataLoader:
    """Batches of this process from the sampler's start, decoded by `dataloader_num_workers` processes."""
    return DataLoader(
        PairDataset(pairs, arguments, image_size),
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=arguments.dataloader_num_workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if arguments.dataloader_num_workers else None,
        generator=torch.Generator(),  # else iterating draws from the generator that a checkpoint restores
    )
