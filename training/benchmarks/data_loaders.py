"""Data loaders of open_clip, of webdataset and of this project over the same tars, for training/benchmarks/data.py.

Each makes batches of training images of 224 pixels and of tokens. open_clip's is its training pipeline, unchanged;
webdataset's decodes by Pillow and applies open_clip's transforms and tokenizer. This project's images stay in uint8,
since the encoder normalizes them on its device.
"""

from __future__ import annotations

import functools
import itertools
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from training.config import PretrainConfig
from training.data.collate import Collator
from training.data.dataset import make_dataloader
from training.data.mixture import open_pairs
from training.data.order import EpochOrder, PairSampler
from training.model.tokenizer import train_tokenizer


SIZE = 224
CONTEXT = 77
BATCH_SIZE = 64
SHUFFLE_BUFFER = 1000
VOCAB_SIZE = 1000

MakeBatches = Callable[[], Iterable[Any]]


def make_loaders(tars: list[Path], num_images: int, num_workers: int) -> dict[str, MakeBatches]:
    """Return functions by name, each of which starts the workers of a loader and returns the batches of one epoch.

    Args:
        tars: at least as many as workers.
        num_images: pairs in all tars.
        num_workers: processes that decode.
    """
    config = PretrainConfig(
        output_dir="none",
        train_data="::".join(map(str, tars)),
        shuffle="shards",
        shuffle_buffer=SHUFFLE_BUFFER,
        per_device_train_batch_size=BATCH_SIZE,
        dataloader_num_workers=num_workers,
    )
    collator = Collator(train_tokenizer(open_pairs(config).captions(), VOCAB_SIZE), CONTEXT)
    loaders: dict[str, MakeBatches] = {"this project": functools.partial(_ours, config, collator, num_images)}
    try:
        import open_clip
    except ImportError:
        print("open_clip_torch and webdataset are not installed: their loaders are left out.")
        return loaders
    transform = open_clip.transform.image_transform(SIZE, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    loaders["open_clip"] = functools.partial(_open_clip, tars, num_images, num_workers, transform, tokenizer)
    loaders["webdataset"] = functools.partial(_webdataset, tars, num_workers, transform, tokenizer)
    return loaders


def _ours(config: PretrainConfig, collator: Collator, num_images: int) -> Iterator[Any]:
    pairs = open_pairs(config)
    sampler = PairSampler(EpochOrder(pairs, config), len(pairs), BATCH_SIZE, 1, 0)
    return itertools.islice(make_dataloader(pairs, config, SIZE, collator, sampler), num_images // BATCH_SIZE)


def _open_clip(tars: list[Path], num_images: int, num_workers: int, transform: Any, tokenizer: Any) -> Iterable[Any]:
    from open_clip_train.data import get_wds_dataset

    arguments = Namespace(
        train_data="::".join(map(str, tars)),
        train_data_upsampling_factors=None,
        train_num_samples=num_images,
        dataset_resampled=False,
        workers=num_workers,
        batch_size=BATCH_SIZE,
        seed=0,
        world_size=1,
    )
    return get_wds_dataset(arguments, transform, is_train=True, floor=True, tokenizer=tokenizer).dataloader


def _webdataset(tars: list[Path], num_workers: int, transform: Any, tokenizer: Any) -> Iterable[Any]:
    import webdataset

    dataset = (
        webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=len(tars))
        .shuffle(SHUFFLE_BUFFER)
        .decode("pilrgb")
        .to_tuple("jpg", "txt")
        .map_tuple(transform, lambda text: tokenizer(text)[0])
        .batched(BATCH_SIZE, partial=False)
    )
    return webdataset.WebLoader(dataset, batch_size=None, num_workers=num_workers)
