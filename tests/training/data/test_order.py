"""Every pair comes exactly once per epoch, in an order that the seed decides."""

import hashlib
import json
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.checkout import pretrain
from tests.helpers.shards import PLAIN, make_config
from training.data.dataset import make_dataloader
from training.data.mixture import open_pairs
from training.data.order import MAX_LOOKAHEAD, ORDER_VERSION, EpochOrder, PairSampler
from training.data.permutation import Complement, Permutation
from training.run.train_state import TrainState


DIGESTS = {
    (1, "samples", False): "b3a2772d0e0e",
    (1, "samples", True): "195add820a31",
    (1, "shards", False): "aa6881c61969",
    (1, "shards", True): "a6f207226f49",
    (2, "samples", False): "b28cf9148e19",
    (2, "samples", True): "afb2449494a7",
    (2, "shards", False): "24704824d296",
    (2, "shards", True): "7f06467f3bb7",
}


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


def make_mixture(*sources):
    """Return a mixture of sources, given by the sizes of their shards, without any pairs."""
    parts = [SimpleNamespace(source="x", shard_sizes=list(sizes)) for sizes in sources]
    return SimpleNamespace(parts=parts)


@pytest.mark.parametrize("version", [1, 2])
def test_shards_are_read_nearly_sequentially(version):
    config, pairs = make_config("x", shuffle="shards", shuffle_buffer=50), make_mixture([100] * 10)
    order = np.asarray(EpochOrder(pairs, config, version=version)(0))
    assert sorted(order) == list(range(1000))
    shards = order // 100
    firsts = [int(np.argmax(shards == shard)) for shard in range(10)]
    lasts = [999 - int(np.argmax(shards[::-1] == shard)) for shard in range(10)]
    assert all(last - first < 100 + 2 * 50 for first, last in zip(firsts, lasts, strict=True))
    assert not np.array_equal(order, EpochOrder(pairs, config, version=version)(1))
    unshuffled = EpochOrder(pairs, make_config("x", shuffle="none"), version=version)
    assert np.array_equal(unshuffled(3), np.arange(1000))


def test_permutations_are_bijections_that_look_random():
    for length in (1, 2, 3, 5, 8, 1000, 4097):
        for key in range(3):
            indices = Permutation(length, [key])(np.arange(length))
            assert np.array_equal(np.sort(indices), np.arange(length))
    first = np.array([Permutation(5, [0, key])(np.arange(5)) for key in range(4000)])
    counts = np.array([np.bincount(column, minlength=5) for column in first.T])
    assert (np.abs(counts - 800) < 6 * (4000 * 0.2 * 0.8) ** 0.5).all()
    indices = Permutation(10**6, [1])(np.arange(10**6))
    assert abs(np.corrcoef(indices[:-1], indices[1:])[0, 1]) < 0.006
    assert abs(np.corrcoef(indices, np.arange(10**6))[0, 1]) < 0.006


MILLION = [100_000, 1, 0, 250_000, 49_999, 600_000]


@pytest.mark.parametrize("shuffle", ["samples", "shards", "none"])
@pytest.mark.parametrize("num_processes", [1, 3, 8])
def test_every_pair_of_a_million_comes_once(shuffle, num_processes):
    config = make_config("x", shuffle=shuffle, shuffle_buffer=70_000)
    held_out = np.random.default_rng(0).choice(10**6, 1000, replace=False)
    order = EpochOrder(make_mixture(MILLION[:3], MILLION[3:]), config, held_out)
    assert len(order) == 999_000
    seen = np.zeros(10**6, int)
    for rank in range(num_processes):
        sampler = PairSampler(order, len(order), 999_000 // num_processes // 3, num_processes, rank)
        for _, share in zip(range(3), sampler._shares(0, 0), strict=False):
            np.add.at(seen, share, 1)
    assert not seen[held_out].any()
    assert np.array_equal(seen[np.setdiff1d(np.arange(10**6), held_out)], np.ones(999_000))


@pytest.mark.parametrize("shuffle", ["samples", "shards", "none"])
def test_sources_with_weights_are_passed_through_evenly(shuffle):
    config = make_config("x", shuffle=shuffle, shuffle_buffer=64, train_data_weights=[1, 3], samples_per_epoch=400)
    held_out = np.array([3, 250])
    order = EpochOrder(make_mixture([150, 50], [20, 0, 31]), config, held_out)
    epochs = [np.asarray(order(epoch)) for epoch in range(6)]
    for epoch in epochs:
        assert len(epoch) == 400 and (epoch < 200).sum() == 100 and not np.isin(epoch, held_out).any()
    counts = np.bincount(np.concatenate(epochs), minlength=251)
    assert set(counts[:200]) - {counts[3]} == {3, 4} and set(counts[200:250]) == {36}
    if shuffle == "shards":  # every window has its share of each source
        assert {(epochs[0][i : i + 64] < 200).sum() for i in range(0, 320, 64)} <= {14, 15, 16, 17, 18}


@pytest.mark.parametrize("shuffle", ["samples", "shards", "none"])
@pytest.mark.parametrize("num_processes", [1, 3, 8])
def test_weighted_sources_of_a_million_pairs_are_passed_through_once(shuffle, num_processes):
    """In two epochs, the first source (half the share, a quarter of the pairs) is passed through twice."""
    config = make_config(
        "x", shuffle=shuffle, shuffle_buffer=50_000, train_data_weights=[1, 1], samples_per_epoch=480_000
    )
    held_out = np.concatenate([np.arange(0, 250_000, 25), 250_000 + np.arange(0, 750_000, 75)])
    order = EpochOrder(make_mixture([100_000, 1, 0, 149_999], [750_000]), config, held_out)
    seen = np.zeros(10**6, int)
    for rank in range(num_processes):
        sampler = PairSampler(order, len(order), 480_000 // num_processes // 2, num_processes, rank)
        for epoch in range(2):
            for share in sampler._shares(epoch, 0):
                np.add.at(seen, share, 1)
    assert not seen[held_out].any()
    first = seen[np.setdiff1d(np.arange(250_000), held_out)]
    assert len(first) == 240_000 and (first == 2).all()
    assert seen[250_000:].max() == 1 and seen[250_000:].sum() == 480_000


@pytest.mark.parametrize("shuffle", ["samples", "shards", "none"])
@pytest.mark.parametrize("weights", [[], [2, 1]])
def test_parts_of_an_epoch_are_what_the_whole_is(shuffle, weights):
    config = make_config("x", shuffle=shuffle, shuffle_buffer=30, train_data_weights=weights)
    order = EpochOrder(make_mixture([40, 60], [35, 65]), config, [7])
    whole = np.asarray(order(5))
    for start in range(0, 199, 17):
        assert np.array_equal(order(5)[start : start + 17], whole[start : start + 17])
    sampler = PairSampler(order, len(order), 8, 2, 1, start_step=30)
    epoch, step = divmod(30, sampler.steps_per_epoch)
    assert [index for _, index in next(iter(sampler))] == order(epoch)[step * 16 + 8 : step * 16 + 16].tolist()


def test_a_billion_pairs_take_memory_for_their_shards_alone():
    sizes = [100_000] * 10_000
    for shuffle in ("samples", "shards"):
        tracemalloc.start()
        config = make_config("x", shuffle=shuffle)
        order = EpochOrder(make_mixture(sizes), config, np.arange(0, 10**9, 10**5))
        sampler = PairSampler(order, len(order), 128, 8, 3, start_step=3_141_592)
        batch = next(iter(sampler))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len({index for _, index in batch}) == 128 and batch[0][0] == 3
        assert peak < 50 * 2**20


def test_orders_stay_what_they_are():
    """Checkpoints rely on them: a change needs another version."""
    digests = {}
    for version in (1, 2):
        for shuffle in ("samples", "shards"):
            for weights in ([], [1, 2]):
                config = make_config("x", shuffle=shuffle, shuffle_buffer=20, train_data_weights=weights, seed=3)
                order = EpochOrder(make_mixture([30, 70], [50]), config, [2, 120], version=version)
                content = np.concatenate([order(0), order(4)]).astype("<i8").tobytes()
                digests[version, shuffle, bool(weights)] = hashlib.sha256(content).hexdigest()[:12]
    assert digests == DIGESTS


def test_unknown_orders_are_refused():
    with pytest.raises(UserError, match="data order 3; this program knows 1 and 2"):
        EpochOrder(make_mixture([10]), make_config("x"), version=3)


def test_weights_and_samples_per_epoch(forms):
    source = f"{forms['parquet']}::{forms['webdataset']}/{{00000..00001}}.tar"
    config = make_config(source, train_data_weights=[1, 3], samples_per_epoch=80)
    pairs = open_pairs(config)
    assert len(pairs) == 132
    order = EpochOrder(pairs, config)
    epochs = [np.asarray(order(epoch)) for epoch in range(8)]
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


def test_checkpoints_without_a_version_have_the_first_order():
    assert TrainState.from_dict({"step": 3}).order_version == 1 < ORDER_VERSION
    config, pairs = make_config("x"), make_mixture([50], [70])
    sampler = PairSampler(EpochOrder(pairs, config, [5]), 119, 10, 1, 0)
    sampler.set_order_version(1)
    assert sampler.order.version == 1 and sampler.order.excluded.tolist() == [5]
    expected = EpochOrder(pairs, config, [5], version=1)(0)[:10]
    assert [index for _, index in next(iter(sampler))] == expected.tolist()
