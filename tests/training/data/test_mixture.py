"""Several sources as one sequence, and sources that are not there."""

import itertools
import pickle

import pytest
import torch

from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.shards import PLAIN, make_config
from training.data.collate import Collator
from training.data.dataset import PairDataset, make_dataloader
from training.data.mixture import open_pairs
from training.data.order import EpochOrder, PairSampler
from training.model.tokenizer import train_tokenizer


def test_every_form_gives_the_same_batches(forms):
    batches, captions = {}, {}
    for form, path in forms.items():
        config = make_config(path, shuffle="none", per_device_train_batch_size=10, dataloader_num_workers=1, **PLAIN)
        pairs = open_pairs(config)
        captions[form] = list(pairs.captions())
        tokenizer = train_tokenizer(captions[form], 700)
        sampler = PairSampler(EpochOrder(pairs, config), len(pairs), 10, 1, 0)
        loader = make_dataloader(pairs, config, 32, Collator(tokenizer, 32), sampler)
        batches[form] = list(itertools.islice(loader, 8))
    first, *others = forms
    for form in others:
        assert captions[form] == captions[first]
        for batch, expected in zip(batches[form], batches[first], strict=True):
            assert torch.equal(batch["pixel_values"], expected["pixel_values"]), form
            assert torch.equal(batch["input_ids"], expected["input_ids"]), form
            assert batch["bad_samples"] == expected["bad_samples"] == []


@pytest.mark.parametrize(
    "source, message",
    [
        ("{}/shards/{{00000..00009}}.tar", "there is no .*00007.tar .3 missing"),
        ("{}/shards/*.jpg", "there is no .*jpg"),
        ("{}/absent.parquet", "no such file"),
        ("{}/images/train/000001.png", "unknown kind of file"),
        ("hf://models/x/y/z.tar", "write hf://datasets/OWNER/NAME/PATTERN"),
    ],
)
def test_missing_sources_are_refused(forms, source, message):
    with pytest.raises(UserError, match=message):
        open_pairs(make_config(source.format(forms["parquet"].parent)))


def test_weights_must_match_sources(forms):
    source = f"{forms['parquet']}::{forms['webdataset']}"
    with pytest.raises(UserError, match="has 1 values for 2 sources"):
        open_pairs(make_config(source, train_data_weights=[1]))


def test_workers_of_every_start_method_read_the_same_pairs(forms):
    """Workers that are not forked receive a pickle of the data set."""
    for form, path in forms.items():
        config = make_config(path, **PLAIN)
        dataset = PairDataset(open_pairs(config), config, 16)
        copy = pickle.loads(pickle.dumps(dataset))
        for index in (0, 57, 99):
            sample, other = dataset[3, index], copy[3, index]
            assert torch.equal(sample.image, other.image) and sample[1:] == other[1:], form


def test_fingerprints_tell_other_pairs_apart(forms):
    shards = forms["webdataset"]
    sources = [shards, f"{shards}/{{00000..00005}}.tar", f"{shards}/{{00006..00000}}.tar", f"{shards}::{shards}"]
    fingerprints = [open_pairs(make_config(source)).fingerprint() for source in sources]
    assert len(set(fingerprints)) == 4 and open_pairs(make_config(shards)).fingerprint() == fingerprints[0]
