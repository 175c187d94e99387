"""eval/apps/texts.py: labels as users write them, and those that a model cannot tell apart."""

import os

import pytest
import torch

from eval.apps.texts import (
    check_encodable,
    clean_labels,
    describe_indistinguishable,
    find_indistinguishable,
    read_lines,
    split_labels,
)
from modeling_amorlip.cli_amorlip import UserError


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("a cat, a dog", ["a cat", "a dog"]),
        ("a cat\na dog\r\n\n bird ", ["a cat", "a dog", "bird"]),
        ("a cat,\na dog,, \n,a cat", ["a cat", "a dog"]),
        (" \n,", []),
    ],
)
def test_split_labels(text, labels):
    assert split_labels(text) == labels


def test_clean_labels():
    assert clean_labels([" red, blue ", "", "red, blue", "Red"]) == ["red, blue", "Red"]


def test_read_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa cat\r\n\r\n  a dog \n".encode())
    assert read_lines(tmp_path / "a.txt") == ["a cat", "a dog"]


def test_check_encodable():
    check_encodable(["日本", "👩‍🚀"])
    with pytest.raises(UserError, match="caf.* is not valid UTF-8"):
        check_encodable(["a", os.fsdecode(b"caf\xe9")])


def test_find_indistinguishable_compares_all_pairs():
    torch.manual_seed(0)
    embeds = torch.nn.functional.normalize(torch.randn(40, 16), dim=-1)
    embeds[33], embeds[39], embeds[20] = embeds[2], embeds[2] + 1e-7, embeds[7]
    embeds[12] = torch.nn.functional.normalize(embeds[11] + 2e-4 * torch.randn(16), dim=-1)  # close, not equal
    texts = [f"label {i}" for i in range(40)]
    expected = [["label 2", "label 33", "label 39"], ["label 7", "label 20"]]
    for tile_size in (1024, 7, 1):
        assert find_indistinguishable(texts, embeds, tile_size) == expected
    assert "'label 7' = 'label 20'" in describe_indistinguishable(expected)
    assert describe_indistinguishable(expected * 4).count(" = ") == 8
