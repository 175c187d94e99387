"""Splitting pictograms by style."""

from __future__ import annotations

import sys

import datasets
import pytest

from tests.helpers.checkout import DEMO
from training.study import study_data


@pytest.fixture
def main(monkeypatch, tmp_path):
    def call(*options):
        monkeypatch.setattr(sys, "argv", ["study_data.py", str(DEMO / "train.parquet"), str(tmp_path), *options])
        return study_data.main()

    return call


def load(folder, name):
    return datasets.load_dataset("parquet", data_files=str(folder / f"{name}.parquet"), split="train")


def captions_of(rows, *styles):
    return [caption for caption, style in zip(rows["caption"], rows["style"], strict=True) if style in styles]


@pytest.mark.e2e
def test_reported_style_is_held_out(main, demo_rows, tmp_path):
    assert main("--reported", "twemoji") == 0
    trained, reported = load(tmp_path, "study_train"), load(tmp_path, "twemoji")
    assert set(trained["style"]) == {"noto", "fluent-emoji-flat"} and len(trained) + len(reported) == 5118
    labels = [reported.features["label"].int2str(label) for label in reported["label"]]
    assert labels == captions_of(demo_rows, "twemoji")


def test_joined_styles_share_classes(main, demo_rows, tmp_path):
    assert main("--reported", "noto+twemoji") == 0
    joined, captions = load(tmp_path, "noto+twemoji"), captions_of(demo_rows, "noto", "twemoji")
    assert len(joined) == len(captions) > joined.features["label"].num_classes == len(set(captions))


def test_unknown_style_raises(main, capsys):
    assert main("--reported", "twemoji", "--trained", "notto") == 1
    assert "No pair has the style notto; choose from fluent-emoji-flat, noto" in capsys.readouterr().err
