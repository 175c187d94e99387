"""Samples are drawn from the columns that the configuration names."""

import pytest

from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.shards import make_config
from training.data.dataset import PairDataset
from training.data.mixture import open_pairs


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
