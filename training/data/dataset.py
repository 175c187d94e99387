"""Decode pairs into samples, deterministically from the seed.

`EpochOrder` orders the pairs of an epoch, `PairSampler` splits that order into global batches and gives each process
its share, `PairDataset` decodes and augments one image and draws one caption, and `Collator` builds the batch. The
generator of a sample is seeded by (seed, epoch, index), so a sample depends neither on what was drawn before nor on
the number of workers and processes, and a run resumes at any batch by starting the sampler there.

A pair that cannot be used is listed and replaced by another one, drawn with the same seed, so batches stay full.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from modeling_amorlip.cli_amorlip import UserError
from modeling_amorlip.images_amorlip import open_image
from training.config import PretrainConfig
from training.data.collate import BadSample, Collator, Sample
from training.data.mixture import Mixture
from training.data.order import EpochOrder, PairSampler
from training.data.pairs import check_caption, usable_captions
from training.data.permutation import Complement
from training.data.prefetch import PrefetchingSampler
from training.data.shards import ShardError
from training.data.transforms import augment


MAX_REPLACEMENTS = 100
MAX_PREFETCH_FACTOR = 4
SHARED_MEMORY = "/dev/shm"


class PairDataset(Dataset):
    """Map (epoch, index) to a `Sample`: image (uint8 [3, size, size]), caption, index and replaced pairs.

    Args:
        pairs: the pairs to read.
        config: names of columns, augmentation, seed and limits.
        image_size: height and width of the images returned.
        replacements: indices that replacements of bad pairs are drawn from; None allows all pairs. Held-out pairs must
            not replace training pairs, nor the other way round.
    """

    def __init__(
        self,
        pairs: Mixture,
        config: PretrainConfig,
        image_size: int,
        replacements: Complement | Sequence[int] | np.ndarray | None = None,
    ):
        self.pairs, self.config, self.image_size = pairs, config, image_size
        self.replacements = range(len(pairs)) if replacements is None else replacements

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        replacements = self._draw_replacements(epoch, index)
        bad_samples: list[BadSample] = []
        for _ in range(MAX_REPLACEMENTS):
            try:
                pixels, caption = self._load(epoch, index)
                return Sample(pixels, caption, index, bad_samples)
            except ShardError:
                raise  # no pair is at fault
            except Exception as error:  # decoders raise any kind of error for damaged files
                bad_samples.append(self._describe_failure(index, error))
                index = next(replacements)
        # The collator reports a batch with an empty image as lost, which stops the run.
        return Sample(torch.empty(0), "", index, bad_samples)

    def _draw_replacements(self, epoch: int, index: int) -> Iterator[int]:
        """Draw pairs to take the place of a bad one, without end."""
        generator = random.Random(f"{self.config.seed}/{epoch}/{index}/substitute")
        while True:
            yield int(self.replacements[generator.randrange(len(self.replacements))])

    def _describe_failure(self, index: int, error: Exception) -> BadSample:
        key, shard = self.pairs.describe(index)
        reason = " ".join(f"{error}".split()) or "damaged"
        return BadSample(key=key, shard=shard, cause=type(error).__name__, reason=reason[:300])

    def _load(self, epoch: int, index: int) -> tuple[torch.Tensor, str]:
        generator = random.Random(f"{self.config.seed}/{epoch}/{index}")
        row = self.pairs[index]
        image = open_image(row[self.config.image_column], self.config.max_image_pixels)
        image = augment(image, self.image_size, self.config.augmentation, generator)
        return image_to_tensor(image), self._draw_caption(row, generator)

    def _draw_caption(self, row: dict[str, Any], generator: random.Random) -> str:
        caption = check_caption(self._choose_caption(row, generator))
        keywords = list(usable_captions(iter([self._list(row, self.config.keywords_column)])))
        if keywords and generator.random() < self.config.keywords_probability:
            parts = [caption, *generator.sample(keywords, k=min(len(keywords), generator.randint(1, 3)))]
            generator.shuffle(parts)
            caption = ", ".join(parts)
        return check_caption(caption)

    def _choose_caption(self, row: dict[str, Any], generator: random.Random) -> Any:
        if alternatives := list(usable_captions(iter([self._list(row, self.config.alternative_captions_column)]))):
            return generator.choice(alternatives)
        columns = [self.config.caption_column, *self.config.further_caption_columns]
        values = [row.get(column) for column in columns]
        # One that cannot be used costs the pair only if there is no other.
        values = [value for value in values if any(usable_captions(iter([value])))] or values[:1]
        caption = generator.choice(values) if len(columns) > 1 else values[0]
        if isinstance(caption, (list, tuple)):
            return generator.choice(list(usable_captions(iter([caption]))) or [caption])
        return caption

    def _list(self, row: dict[str, Any], column: str | None) -> Sequence[Any] | None:
        """Return a column of lists; None if there is none.

        Raises:
            ValueError: the value is something else, of which drawing would take single letters.
        """
        value = row.get(column) if column else None
        if value is not None and not isinstance(value, (list, tuple)):
            raise ValueError(f"{column} is {str(value)[:50]!r}; it must be a list of texts")
        return value


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """Return the pixels of an RGB image, uint8 [3, height, width]; faster than transposing them."""
    pixels = bytearray().join(band.tobytes() for band in image.split())
    return torch.frombuffer(pixels, dtype=torch.uint8).view(3, image.height, image.width)


def make_dataloader(
    pairs: Mixture, config: PretrainConfig, image_size: int, collator: Collator, sampler: PairSampler
) -> DataLoader:
    """Return a loader of this process's batches, from the sampler's first step on.

    `config.dataloader_num_workers` processes decode the images. Replacements of bad pairs are drawn from the pairs that
    the sampler's order contains.

    Raises:
        UserError: the batches that workers hold ready do not fit the shared memory.
    """
    excluded = sampler.order.excluded if isinstance(sampler.order, EpochOrder) else ()
    num_workers = config.dataloader_num_workers
    return DataLoader(
        PairDataset(pairs, config, image_size, Complement(len(pairs), excluded)),
        batch_sampler=PrefetchingSampler(sampler, pairs) if pairs.is_remote else sampler,
        collate_fn=collator,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=choose_prefetch_factor(config, image_size) if num_workers else None,
        generator=torch.Generator(),  # otherwise iterating draws from the global generator, which checkpoints restore
        worker_init_fn=init_worker,
    )


def init_worker(worker: int) -> None:
    """Tokenize in one thread: the tokenizer's thread pool does not survive a fork, and waiting for it never ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def choose_prefetch_factor(config: PretrainConfig, image_size: int) -> int:
    """Return how many batches each worker holds ready, as many as the shared memory has room for.

    Raises:
        UserError: there is no room for one; workers would stop and the run would hang.
    """
    free = _free_shared_memory()
    batch = config.per_device_train_batch_size * 3 * image_size**2
    num_workers = config.dataloader_num_workers * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    for prefetch_factor in range(MAX_PREFETCH_FACTOR, 0, -1):
        # One more batch of each worker is being read.
        if free is None or num_workers * (prefetch_factor + 1) * batch <= free:
            return prefetch_factor
    needed = 2 * num_workers * batch
    raise UserError(
        f"{SHARED_MEMORY} has {(free or 0) / 2**20:.0f} MB free; the batches of {num_workers} workers need "
        f"{needed / 2**20:.0f} MB. Enlarge it (docker run --shm-size=16g), or lower dataloader_num_workers (0 needs "
        "none) or per_device_train_batch_size."
    )


def _free_shared_memory() -> int | None:
    """Return the free bytes of the shared memory; None where there is none."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize
