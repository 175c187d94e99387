"""From a source of image-text pairs to batches, in an order and with augmentations that the seed alone decides.

The path of a sample: `EpochOrder` puts an epoch's pairs in order; `PairSampler` divides it into global batches and
gives every process its share; `PairDataset` decodes one image, crops, resizes and augments it and draws one caption,
with a generator seeded by (seed, epoch, index); `Collator` stacks images as uint8 and tokenizes captions, padded to the
longest of the batch. Since nothing depends on what was drawn before, a run continues at any batch by starting the
sampler there, and neither the number of workers nor that of processes changes a sample.

A pair that cannot be used is listed, and another, drawn by the same seed, stands in for it, so that batches stay full.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch.utils.data import DataLoader

from modeling_amorlip.images_amorlip import open_image
from training.config import PretrainConfig
from training.data.collate import Collator
from training.data.mixture import Mixture
from training.data.order import PairSampler
from training.data.transforms import augment


LONGEST_CAPTION = 100_000
MAX_REPLACEMENTS = 100


class PairDataset(torch.utils.data.Dataset):
    """(epoch, index) -> (image uint8 [3, size, size], caption, index, [pairs that could not be used])."""

    def __init__(self, pairs: Mixture, arguments: PretrainConfig, image_size: int):
        self.pairs, self.arguments, self.image_size = pairs, arguments, image_size
        self.augmentation = arguments.augmentation

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        substitutes, bad = random.Random(f"{self.arguments.seed}/{epoch}/{index}/substitute"), []
        for _ in range(MAX_REPLACEMENTS):
            try:
                pixels, caption = self._load(epoch, index)
                return pixels, caption, index, bad
            except Exception as error:  # files can be wrong in any way
                name, file = self.pairs.describe(index)
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
        caption = (
            generator.choice(alternatives)
            if alternatives
            else row.get(generator.choice(columns) if len(columns) > 1 else columns[0])
        )
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
