"""From any source of image-text pairs to batches, in an order and with augmentations that the seed alone decides.

The path of a sample: `PairSampler` decides which indices form each global batch of an epoch and gives every process its
share; `PairDataset` decodes one image, crops, resizes and augments it and draws one caption, with a generator seeded by
(seed, epoch, index); `Collator` stacks images as uint8 and tokenizes captions, padded to the longest of the batch.
Since nothing depends on what was drawn before, a run continues at any batch by starting the sampler there, and neither
the number of workers nor that of processes changes a sample.
"""

from __future__ import annotations

import io
import math
import random
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter, ImageOps
from torch.utils.data import DataLoader, Sampler

from eval.encode import on_white
from eval.errors import UserError

from .arguments import Augmentation, PretrainArguments


def load_pairs(arguments: PretrainArguments) -> datasets.Dataset:
    """Opens `train_data`, checks its columns and captions, and leaves images undecoded.

    Raises:
        UserError: nothing there, no rows, a missing column, or an unusable caption.
    """
    pairs = _open(arguments.train_data, arguments.train_split)
    if len(pairs) == 0:
        raise UserError(f"train_data {arguments.train_data} has no rows.")
    fields = ("image_column", "caption_column", "alternative_captions_column", "keywords_column", "group_column")
    for field in fields:
        column = getattr(arguments, field)
        if column is not None and column not in pairs.column_names:
            raise UserError(f"{field} {column!r} is not in {arguments.train_data}; its columns: {pairs.column_names}.")
    for row, caption in enumerate(pairs[arguments.caption_column]):
        if not isinstance(caption, str) or not caption.strip():
            raise UserError(
                f"Row {row} of {arguments.train_data}: {arguments.caption_column} is {caption!r}; "
                "every caption must be text that is not empty. Drop or mend the row."
            )
    return pairs.cast_column(arguments.image_column, datasets.Image(decode=False))


def _open(source: str, split: str) -> datasets.Dataset:
    path, options = Path(source), {"split": split}
    builders = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
    try:
        if path.is_file():
            if path.suffix not in builders:
                raise UserError(f"train_data {source}: unknown kind of file; use one of {', '.join(builders)}.")
            if path.suffix == ".tsv":
                options["sep"] = "\t"
            return datasets.load_dataset(builders[path.suffix], data_files={split: str(path)}, **options)
        if path.is_dir() and (path / "dataset_info.json").exists():
            return datasets.load_from_disk(source)
        if path.is_dir():
            if not any(path.iterdir()):
                raise UserError(f"train_data {source} is an empty folder.")
            return datasets.load_dataset(source, **options)
        if path.is_absolute() or source.startswith(".") or source.count("/") != 1 or path.suffix:
            raise UserError(f"train_data {source}: there is no such file or folder.")
        return datasets.load_dataset(source, **options)
    except UserError:
        raise
    except Exception as error:  # datasets raises many kinds; the user needs the source and the reason
        if "corresponds to no data" in str(error):
            raise UserError(f"train_data {source} has no rows.") from None
        raise UserError(f"train_data {source} (split {split!r}) cannot be read: {error}") from None


class PairSampler(Sampler):
    """Yields this process's share of every global batch as lists of (epoch, index), endlessly from `start_step`.

    An epoch visits every pair at most once, in an order of its own, and drops what does not fill a batch. Rows with an
    equal `groups` value are kept out of each other's batches as far as that is possible.
    """

    def __init__(self, num_pairs, batch_size, num_processes, process_index, seed, groups=None, start_step=0):
        self.num_pairs, self.batch_size, self.seed, self.groups = num_pairs, batch_size, seed, groups
        self.global_batch_size = batch_size * num_processes
        self.share = slice(process_index * batch_size, (process_index + 1) * batch_size)
        self.steps_per_epoch = num_pairs // self.global_batch_size
        self.start_step = start_step
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{num_pairs} pairs do not fill one batch of {self.global_batch_size} "
                f"({batch_size} x {num_processes} processes): lower per_device_train_batch_size."
            )

    def batches(self, epoch: int) -> list[list[int]]:
        """The epoch's global batches."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_pairs).tolist()
        size = self.global_batch_size
        if self.groups is None:
            return [order[i * size : (i + 1) * size] for i in range(self.steps_per_epoch)]
        waiting, batches = deque(order), []
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
            batches.append(batch)
        return batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, position = divmod(self.start_step, self.steps_per_epoch)
        while True:
            for batch in self.batches(epoch)[position:]:
                yield [(epoch, index) for index in batch[self.share]]
            epoch, position = epoch + 1, 0


class PairDataset(torch.utils.data.Dataset):
    """(epoch, index) -> (image uint8 [3, size, size], caption, index), or the `UserError` that the sample caused."""

    def __init__(self, pairs: datasets.Dataset, arguments: PretrainArguments, image_size: int):
        self.pairs, self.arguments, self.image_size = pairs, arguments, image_size
        self.augmentation = arguments.parsed_augmentation

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        generator = random.Random(f"{self.arguments.seed}/{epoch}/{index}")
        row = self.pairs[index]
        try:
            image = decode_image(row[self.arguments.image_column])
        except Exception as error:  # Pillow raises many kinds
            return UserError(
                f"Row {index} of {self.arguments.train_data}: the image cannot be decoded ({error}). "
                "Drop or mend the row."
            )
        image = augment(image, self.image_size, self.augmentation, generator)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return pixels, self._caption(row, generator), index

    def _caption(self, row: dict, generator: random.Random) -> str:
        arguments = self.arguments
        alternatives = row[arguments.alternative_captions_column] if arguments.alternative_captions_column else None
        caption = generator.choice(alternatives) if alternatives else row[arguments.caption_column]
        keywords = row[arguments.keywords_column] if arguments.keywords_column else None
        if keywords and generator.random() < arguments.keywords_probability:
            parts = [caption, *generator.sample(keywords, k=min(len(keywords), generator.randint(1, 3)))]
            generator.shuffle(parts)
            caption = ", ".join(parts)
        return caption


def decode_image(value: dict) -> Image.Image:
    """An RGB image from `datasets`' {bytes, path}; transparency is laid on white.

    Raises:
        Exception: whatever Pillow raises for data that is not a whole image.
    """
    source = io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value["path"]
    with Image.open(source) as image:
        return on_white(image)


def augment(image: Image.Image, size: int, settings: Augmentation, generator: random.Random) -> Image.Image:
    """Crop, resize (one bicubic resampling), move, mirror and recolour; returns an RGB image of size x size pixels."""
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=_crop_box(image.size, settings, generator))
    zoom = math.exp(generator.uniform(*map(math.log, settings.zoom)))
    angle = math.radians(generator.uniform(-settings.rotation, settings.rotation))
    shift = [size * generator.uniform(-settings.translation, settings.translation) for _ in range(2)]
    if (zoom, angle, *shift) != (1, 0, 0, 0):
        # Output pixel (x, y) is read at centre + R (x, y - centre - shift) / zoom.
        cos, sin, centre = math.cos(angle) / zoom, math.sin(angle) / zoom, size / 2
        x, y = centre + shift[0], centre + shift[1]
        matrix = (cos, -sin, centre - cos * x + sin * y, sin, cos, centre - sin * x - cos * y)
        border = image.getpixel((0, 0))
        image = image.transform(
            (size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=border
        )
    if generator.random() < settings.horizontal_flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if settings.color_jitter:
        image = image.convert("RGB", _color_matrix(settings.color_jitter, generator))
    if generator.random() < settings.restyle:
        image = generator.choice(RESTYLES)(image)
    return image


RESTYLES = (
    ImageOps.autocontrast,
    ImageOps.equalize,
    ImageOps.invert,
    lambda image: ImageOps.posterize(image, 2),
    lambda image: ImageOps.grayscale(image).convert("RGB"),
    lambda image: image.filter(ImageFilter.BLUR),
    lambda image: image.filter(ImageFilter.EDGE_ENHANCE_MORE),
    lambda image: ImageChops.multiply(image, image.filter(ImageFilter.CONTOUR)),
)
"""Other ways to draw the same thing: tones, colours, sharpness and outlines."""


def _crop_box(image_size, settings: Augmentation, generator: random.Random) -> tuple[float, float, float, float]:
    """A box of random area and shape inside the image (Inception's RandomResizedCrop)."""
    width, height = image_size
    area = width * height * generator.uniform(*settings.crop_scale)
    ratio = math.exp(generator.uniform(*map(math.log, settings.crop_ratio)))
    w, h = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    left, top = generator.uniform(0, width - w), generator.uniform(0, height - h)
    return left, top, min(left + w, width), min(top + h, height)


def _color_matrix(strength: float, generator: random.Random) -> tuple[float, ...]:
    """Brightness, contrast about mid-grey and saturation as one 3 x 4 matrix on RGB."""
    brightness, contrast, saturation = (generator.uniform(1 - strength, 1 + strength) for _ in range(3))
    luma, gain = (0.299, 0.587, 0.114), brightness * contrast
    offset = 128 * (1 - contrast)
    matrix = []
    for row in range(3):
        matrix += [gain * ((1 - saturation) * luma[column] + saturation * (row == column)) for column in range(3)]
        matrix.append(offset)
    return tuple(matrix)


class Collator:
    """Samples -> {pixel_values uint8 [N, 3, H, W], input_ids, attention_mask [N, longest], sample_ids [N]}.

    Returns a sample's `UserError` instead, so that workers hand it on without a trace of frames.
    """

    def __init__(self, tokenizer, max_length: int):
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, samples):
        for sample in samples:
            if isinstance(sample, UserError):
                return sample
        images, captions, indices = zip(*samples, strict=True)
        text = self.tokenizer(
            list(captions), padding="longest", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return {
            "pixel_values": torch.stack(images),
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"],
            "sample_ids": torch.tensor(indices),
        }


def make_dataloader(pairs, arguments, image_size, tokenizer, max_length, sampler: PairSampler) -> DataLoader:
    """Batches of this process from the sampler's start, decoded by `dataloader_num_workers` processes."""
    return DataLoader(
        PairDataset(pairs, arguments, image_size),
        batch_sampler=sampler,
        collate_fn=Collator(tokenizer, max_length),
        num_workers=arguments.dataloader_num_workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if arguments.dataloader_num_workers else None,
        generator=torch.Generator(),  # else iterating draws from the generator that a checkpoint restores
    )
