"""Samples are drawn from the columns that the configuration names."""

import json

import numpy as np
import pytest

import training.data.dataset
from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.shards import PLAIN, make_config, write_tar
from training.data.dataset import PairDataset, choose_prefetch_factor, make_dataloader
from training.data.mixture import open_pairs
from training.data.order import EpochOrder, PairSampler
from training.model.tokenizer import train_tokenizer


def test_captions_from_several_columns_and_json(forms):
    config = make_config(
        forms["webdataset"], further_caption_columns=["key"], keywords_column="labels", keywords_probability=1.0
    )
    pairs = open_pairs(config)
    dataset = PairDataset(pairs, config, 32)
    texts = [dataset[0, i].caption.split(", ") for i in range(100)]
    captions = [pairs[i]["caption"] for i in range(100)]
    by_key = sum(f"{i:09d}" in text for i, text in enumerate(texts))
    by_caption = sum(caption in ", ".join(text) for caption, text in zip(captions, texts, strict=True))
    assert 30 < by_key < 70 and by_key + by_caption >= 100
    assert all({"thing", str(i)} & set(text) for i, text in enumerate(texts))
    with pytest.raises(UserError, match="further_caption_columns 'alt' is not in"):
        open_pairs(make_config(forms["parquet"], further_caption_columns=["alt"]))


def test_rows_of_text_where_lists_belong_are_bad_samples(rows, tmp_path):
    members = []
    for i, tags in enumerate([["a", "b"], "letters"]):
        about = {"caption": "c", "tags": tags}
        members += [(f"{i}.png", rows[i]["image"]["bytes"]), (f"{i}.json", json.dumps(about).encode())]
    write_tar(tmp_path / "0.tar", members)
    config = make_config(tmp_path, keywords_column="tags", keywords_probability=1.0)
    sample = PairDataset(open_pairs(config), config, 8)[0, 1]
    assert sample.bad_samples[0]["reason"] == "tags is 'letters'; it must be a list of texts"


def test_lone_surrogates_are_bad_samples_and_train_no_tokenizer(rows, tmp_path):
    members = []
    for i, caption in enumerate([b"good", rb"bad \ud83d", rb"pair \ud83d\ude00"]):
        members += [(f"{i}.png", rows[i]["image"]["bytes"]), (f"{i}.json", b'{"caption": "%s"}' % caption)]
    write_tar(tmp_path / "0.tar", members)
    config = make_config(tmp_path)
    pairs = open_pairs(config)
    dataset = PairDataset(pairs, config, 8)
    assert "not valid Unicode: surrogates not allowed at character 4" in dataset[0, 1].bad_samples[0]["reason"]
    assert not dataset[0, 2].bad_samples and dataset[0, 2].caption == "pair \N{GRINNING FACE}"
    assert list(pairs.captions()) == ["good", "pair \N{GRINNING FACE}"]
    train_tokenizer(pairs.captions(), 520)


def test_captions_too_long_for_training_train_no_tokenizer(rows, tmp_path):
    captions = ["a cat", "a" * 300_000, " ", "b" * 99_000]
    write_tar(
        tmp_path / "0.tar",
        [
            member
            for i, caption in enumerate(captions)
            for member in ((f"{i}.png", rows[i]["image"]["bytes"]), (f"{i}.txt", caption.encode()))
        ],
    )
    assert list(open_pairs(make_config(tmp_path)).captions()) == ["a cat", "b" * 99_000]


@pytest.fixture
def half_bad(rows, tmp_path):
    """80 pairs, of which every second cannot be decoded."""
    members = []
    for i in range(80):
        members += [(f"{i}.png", rows[i]["image"]["bytes"] if i % 2 else b"damaged"), (f"{i}.txt", b"caption")]
    write_tar(tmp_path / "0.tar", members)
    return tmp_path


def test_replacements_and_held_out_pairs_never_meet(half_bad):
    config = make_config(half_bad, **PLAIN)
    pairs = open_pairs(config)
    held_out = np.arange(0, 80, 5)
    order = EpochOrder(pairs, config, held_out)
    sampler = PairSampler(order, len(order), 16, 1, 0)
    dataset = make_dataloader(pairs, config, 8, lambda samples: samples, sampler).dataset
    for epoch in range(5):
        assert sorted(order(epoch)) == sorted(set(range(80)) - set(held_out))
        samples = [dataset[epoch, int(index)] for index in order(epoch)]
        used = {sample.sample_id for sample in samples}
        tried = used | {int(bad["key"]) for sample in samples for bad in sample.bad_samples}
        assert not tried & set(held_out) and all(index % 2 for index in used)
    validation = PairDataset(pairs, config, 8, replacements=held_out)
    assert {validation[0, int(index)].sample_id for index in held_out} <= set(held_out)


def test_small_shared_memory_is_met_before_workers_start(monkeypatch):
    config = make_config("x", per_device_train_batch_size=256, dataloader_num_workers=2)
    batch = 256 * 3 * 224**2
    for free, expected in ((None, 4), (10 * batch, 4), (10 * batch - 1, 3), (4 * batch, 1)):
        monkeypatch.setattr(training.data.dataset, "_free_shared_memory", lambda free=free: free)
        assert choose_prefetch_factor(config, 224) == expected
    monkeypatch.setattr(training.data.dataset, "_free_shared_memory", lambda: 64 * 2**20)
    with pytest.raises(UserError, match="64 MB free; the batches of 2 workers need 147 MB.*--shm-size"):
        choose_prefetch_factor(config, 224)
