"""Every pair comes exactly once per epoch, in an order that the seed decides."""

import json

import numpy as np
import pytest
import torch

from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.checkout import pretrain
from tests.helpers.shards import PLAIN, make_config
from training.data.dataset import make_dataloader
from training.data.mixture import open_pairs
from training.data.order import MAX_LOOKAHEAD, Complement, EpochOrder, PairSampler


def collect_ids(samples):
    return [sample.sample_id for sample in samples]


@pytest.mark.parametrize("shuffle", ["samples", "shards"])
def test_two_processes_and_two_workers_see_every_pair_once(forms, shuffle):
    """100 pairs in 7 shards, of which one has 2 pairs and one 30."""
    config = make_config(forms["webdataset"], shuffle=shuffle, shuffle_buffer=20, dataloader_num_workers=2, **PLAIN)
    pairs = open_pairs(config)
    shares = []
    for rank in range(2):
        sampler = PairSampler(EpochOrder(pairs, config), len(pairs), 10, 2, rank)
        batches = iter(make_dataloader(pairs, config, 32, collect_ids, sampler))
        shares.append([next(batches) for _ in range(10)])
    epochs = []
    for start in (0, 5):
        steps = slice(start, start + 5)
        epochs.append(sum(shares[0][steps] + shares[1][steps], []))
        assert sorted(epochs[-1]) == list(range(100))
    assert epochs[0] != epochs[1]


def test_more_workers_than_shards_and_batches(forms):
    config = make_config(forms["webdataset"] / "00000.tar", dataloader_num_workers=5)
    pairs = open_pairs(config)
    sampler = PairSampler(EpochOrder(pairs, config), len(pairs), 10, 1, 0)
    batches = iter(make_dataloader(pairs, config, 32, collect_ids, sampler))
    assert sorted(next(batches) + next(batches) + next(batches)) == list(range(30))


def test_shards_are_read_nearly_sequentially():
    class Shards:
        parts = [type("Part", (), {"shard_sizes": [100] * 10, "__len__": lambda self: 1000})()]

    config = make_config("x", shuffle="shards", shuffle_buffer=50)
    order = EpochOrder(Shards, config)(0)
    assert sorted(order) == list(range(1000))
    shards = order // 100
    firsts = [int(np.argmax(shards == shard)) for shard in range(10)]
    lasts = [999 - int(np.argmax(shards[::-1] == shard)) for shard in range(10)]
    assert all(last - first < 100 + 2 * 50 for first, last in zip(firsts, lasts, strict=True))
    assert not np.array_equal(order, EpochOrder(Shards, config)(1))
    assert np.array_equal(EpochOrder(Shards, make_config("x", shuffle="none"))(3), np.arange(1000))


def test_weights_and_samples_per_epoch(forms):
    source = f"{forms['parquet']}::{forms['webdataset']}/{{00000..00001}}.tar"
    config = make_config(source, train_data_weights=[1, 3], samples_per_epoch=80)
    pairs = open_pairs(config)
    assert len(pairs) == 132
    order = EpochOrder(pairs, config)
    epochs = [order(epoch) for epoch in range(8)]
    assert {len(epoch) for epoch in epochs} == {len(order)} == {80}
    indices = np.concatenate(epochs)
    assert (indices < 100).sum() == 8 * 20 and (indices >= 100).sum() == 8 * 60
    # 480 of 32 pairs: fifteen whole passes, each pair once per pass.
    assert set(np.unique(indices[indices >= 100], return_counts=True)[1]) == {15}
    assert set(np.unique(indices[indices < 100], return_counts=True)[1]) == {1, 2}
    with pytest.raises(UserError, match="above 0"):
        make_config(source, train_data_weights=[1, 0])


def test_complement_is_the_sorted_rest():
    generator = np.random.default_rng(0)
    for length in (1, 2, 10, 50):
        for count in (0, 1, length // 2, length):
            excluded = generator.choice(length, count, replace=False)
            rest = Complement(length, excluded)
            assert rest[np.arange(len(rest))].tolist() == sorted(set(range(length)) - set(excluded.tolist()))


class CountedGroups(list):
    """Groups that count how often they are looked at."""

    looks = 0

    def __getitem__(self, index):
        self.looks += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("frequent", [None, "frequent"])
def test_a_frequent_group_costs_a_bounded_search(frequent):
    groups = CountedGroups(frequent if i % 20 else i for i in range(20_000))
    sampler = PairSampler(lambda epoch: np.arange(20_000), 20_000, 50, 2, 0, groups)
    batches = list(sampler.batches(0))
    assert sorted(sum(batches, [])) == list(range(20_000))
    assert groups.looks <= 20_000 * (1 + MAX_LOOKAHEAD)


@pytest.mark.e2e
def test_held_out_pairs_are_never_trained_on(recipe, forms, tmp_path):
    path = recipe(
        **PLAIN,
        train_data=str(forms["parquet"]),
        validation_samples=36,
        num_train_epochs=3,
        eval_every=4,
        objective="fastclip",
        objective_args={},
    )
    result = pretrain(path)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/eval.jsonl").open()]
    assert [line["step"] for line in lines] == [4, 8, 12] and all(3 < line["validation_loss"] < 5 for line in lines)
    checkpoint = sorted((tmp_path / "run/checkpoints").iterdir())[-1]
    (state,) = (torch.load(f, weights_only=True) for f in checkpoint.glob("custom_checkpoint_*.pkl"))
    assert state["log_u"].isfinite().sum(1).tolist() == [64, 64]  # FastCLIP estimates exist for trained pairs only
    refused = pretrain(path, "--validation_samples", "100", "--output_dir", tmp_path / "other")
    assert refused.returncode == 1 and "are not below the 100 pairs" in refused.stderr
