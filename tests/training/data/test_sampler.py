"""The sampler: every pair once per epoch, groups apart, and any step to start at."""

import numpy as np

from training.data.order import PairSampler


def test_sampler_sees_every_pair_once_and_keeps_groups_apart():
    groups = [i // 3 for i in range(300)]

    def order(epoch):
        return np.random.default_rng(epoch).permutation(300)

    shares = [PairSampler(order, 300, 10, 2, rank, groups) for rank in range(2)]
    batches = list(shares[0].batches(0))
    assert sorted(sum(batches, [])) == list(range(300))
    repeated = sum(len(batch) - len({groups[i] for i in batch}) for batch in batches)
    assert repeated <= 6, "only the last batches may have to repeat a group"
    first = [next(iter(share)) for share in shares]
    assert [index for _, index in first[0] + first[1]] == batches[0]
    assert list(shares[0].batches(1)) != batches
    resumed = PairSampler(order, 300, 10, 2, 0, groups, start_step=17)
    iterator = iter(shares[0])
    assert [next(iterator) for _ in range(20)][17:] == [
        batch for batch, _ in zip(iter(resumed), range(3), strict=False)
    ]
