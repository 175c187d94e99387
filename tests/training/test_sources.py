"""One set of pairs in every form that it may come in, read in order, mixed, shared out and left out."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.checkout import ROOT, pretrain, with_threads
from tests.helpers.runs import assert_same_weights, read_metrics
from tests.helpers.shards import PLAIN, write_shards
from training.config import PretrainConfig, parse_config
from training.data.collate import Collator
from training.data.dataset import PairDataset, make_dataloader
from training.data.mixture import open_pairs
from training.data.order import EpochOrder, PairSampler
from training.data.remote import expand


def write_forms(rows: list[dict], folder: Path) -> dict[str, Path]:
    """The pairs (image bytes and caption) as WebDataset, parquet, image folder, CSV and TSV: {form: train_data}."""
    write_shards(rows, folder / "shards")
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(folder / "pairs.parquet")
    images = folder / "images/train"
    images.mkdir(parents=True)
    for i, row in enumerate(rows):
        (images / f"{i:06d}.png").write_bytes(row["image"]["bytes"])
    names = [(f"{i:06d}.png", row["caption"]) for i, row in enumerate(rows)]
    for path, header, prefix, separator in (
        (images / "metadata.csv", ("file_name", "caption"), "", ","),
        (folder / "pairs.csv", ("filepath", "title"), "images/train/", ","),
        (folder / "pairs.tsv", ("filepath", "title"), str(images) + "/", "\t"),
    ):
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter=separator)
            writer.writerow(header)
            writer.writerows([(prefix + name, caption) for name, caption in names])
    return {
        "webdataset": folder / "shards",
        "parquet": folder / "pairs.parquet",
        "folder": folder / "images",
        "csv": folder / "pairs.csv",
        "tsv": folder / "pairs.tsv",
    }


@pytest.fixture(scope="module")
def rows(demo_rows):
    raw = demo_rows.cast_column("image", datasets.Image(decode=False)).select(range(100))
    return [{"image": {"bytes": row["image"]["bytes"]}, "caption": row["caption"]} for row in raw]


@pytest.fixture(scope="module")
def forms(rows, tmp_path_factory):
    return write_forms(rows, tmp_path_factory.mktemp("forms"))


def arguments(train_data, **changes) -> PretrainConfig:
    return PretrainConfig(output_dir="unused", train_data=str(train_data), **changes)


def test_every_form_trains_to_the_same_losses(recipe, forms, tmp_path):
    for form, path in forms.items():
        changes = {**PLAIN, "train_data": str(path), "shuffle": "none", "max_steps": 8, "dataloader_num_workers": 1}
        result = pretrain(recipe(output_dir=str(tmp_path / form), **changes))
        assert result.returncode == 0, result.stderr
    first, *others = forms
    assert len(read_metrics(tmp_path / first)) == 8
    for form in others:
        assert read_metrics(tmp_path / form) == read_metrics(tmp_path / first), form
        assert_same_weights(tmp_path / form, tmp_path / first)


RECORDER = """
import json, os, sys
sys.path.insert(0, "ROOT")

from training.config import parse_config
from training.trainer import Trainer

class Recorder(Trainer):
    def training_step(self, batch, logs=False):
        with open(f"FOLDER/{self.accelerator.process_index}.jsonl", "a") as file:
            file.write(json.dumps(batch["sample_ids"].tolist()) + "\\n")
        return super().training_step(batch, logs)

Recorder(parse_config(sys.argv[1:])).train()
"""


@pytest.mark.parametrize("shuffle", ["samples", "shards"])
def test_two_processes_and_four_workers_see_every_pair_once(recipe, forms, tmp_path, shuffle):
    """100 pairs in 7 shards, of which one has 2 and one 30."""
    script = tmp_path / "record.py"
    script.write_text(RECORDER.replace("ROOT", str(ROOT)).replace("FOLDER", str(tmp_path)))
    path = recipe(
        **PLAIN,
        train_data=str(forms["webdataset"]),
        shuffle=shuffle,
        shuffle_buffer=20,
        num_train_epochs=2,
        per_device_train_batch_size=10,
        dataloader_num_workers=2,
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    result = subprocess.run(
        [*command, "--config", path], capture_output=True, text=True, timeout=180, env=with_threads(1)
    )
    assert result.returncode == 0, result.stderr
    shares = [[json.loads(line) for line in (tmp_path / f"{rank}.jsonl").open()] for rank in range(2)]
    assert [len(share) for share in shares] == [10, 10]
    orders = []
    for epoch in range(2):
        steps = slice(5 * epoch, 5 * epoch + 5)
        orders.append(sum(shares[0][steps] + shares[1][steps], []))
        assert sorted(orders[-1]) == list(range(100))
    assert orders[0] != orders[1]


def test_more_workers_than_shards_and_batches(forms):
    options = arguments(forms["webdataset"] / "00000.tar", per_device_train_batch_size=10, dataloader_num_workers=5)
    pairs = open_pairs(options)
    sampler = PairSampler(EpochOrder(pairs, options), len(pairs), 10, 1, 0)
    loader = make_dataloader(pairs, options, 32, lambda samples: [index for _, _, index, _ in samples], sampler)
    batches = iter(loader)
    assert sorted(next(batches) + next(batches) + next(batches)) == list(range(30))


def test_shards_are_read_nearly_in_order():
    class Shards:
        parts = [type("Part", (), {"shard_sizes": [100] * 10, "__len__": lambda self: 1000})()]

    options = arguments("x", shuffle="shards", shuffle_buffer=50)
    order = EpochOrder(Shards, options)(0)
    assert sorted(order) == list(range(1000))
    shards = order // 100
    firsts = [int(np.argmax(shards == shard)) for shard in range(10)]
    lasts = [999 - int(np.argmax(shards[::-1] == shard)) for shard in range(10)]
    assert all(last - first < 100 + 2 * 50 for first, last in zip(firsts, lasts, strict=True))
    assert not np.array_equal(order, EpochOrder(Shards, options)(1))
    assert np.array_equal(EpochOrder(Shards, arguments("x", shuffle="none"))(3), np.arange(1000))


def test_mixtures_and_epochs_of_a_given_length(forms):
    source = f"{forms['parquet']}::{forms['webdataset']}/{{00000..00001}}.tar"
    options = arguments(source, train_data_weights=[1, 3], samples_per_epoch=80)
    pairs = open_pairs(options)
    assert len(pairs) == 132
    order = EpochOrder(pairs, options)
    epochs = [order(epoch) for epoch in range(8)]
    assert {len(epoch) for epoch in epochs} == {len(order)} == {80}
    seen = np.concatenate(epochs)
    assert (seen < 100).sum() == 8 * 20 and (seen >= 100).sum() == 8 * 60
    # 480 of 32 pairs: fifteen whole passes, each pair once a pass.
    assert set(np.unique(seen[seen >= 100], return_counts=True)[1]) == {15}
    assert set(np.unique(seen[seen < 100], return_counts=True)[1]) <= {1, 2}
    with pytest.raises(UserError, match="has 1 values for 2 sources"):
        open_pairs(arguments(source, train_data_weights=[1]))
    with pytest.raises(UserError, match="above 0"):
        arguments(source, train_data_weights=[1, 0])


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
def test_sources_that_are_not_there(forms, source, message):
    with pytest.raises(UserError, match=message):
        open_pairs(arguments(source.format(forms["parquet"].parent)))


def test_patterns(tmp_path):
    for name in ("a_08.tar", "a_09.tar", "a_10.tar", "b.tar"):
        (tmp_path / name).touch()
    assert [Path(p).name for p in expand(f"{tmp_path}/a_{{08..10}}.tar")] == ["a_08.tar", "a_09.tar", "a_10.tar"]
    assert [Path(p).name for p in expand(f"{tmp_path}/{{b,a_09}}.tar")] == ["b.tar", "a_09.tar"]
    assert len(expand(str(tmp_path))) == len(expand(f"{tmp_path}/*.tar")) == 4


def test_captions_from_several_columns_and_json(forms):
    options = arguments(
        forms["webdataset"], further_caption_columns=["key"], keywords_column="labels", keywords_probability=1.0
    )
    pairs = open_pairs(options)
    dataset = PairDataset(pairs, options, 32)
    texts = [dataset[0, i][1].split(", ") for i in range(100)]
    captions = [pairs[i]["caption"] for i in range(100)]
    by_key = sum(f"{i:09d}" in text for i, text in enumerate(texts))
    by_caption = sum(caption in ", ".join(text) for caption, text in zip(captions, texts, strict=True))
    assert 30 < by_key < 70 and by_key + by_caption >= 100
    assert all({"thing", str(i)} & set(text) for i, text in enumerate(texts))
    with pytest.raises(UserError, match="further_caption_columns: 'alt' is not in"):
        open_pairs(arguments(forms["parquet"], further_caption_columns=["alt"]))


def test_texts_are_padded_to_the_batch(forms):
    from training.model.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["a cat", "a dog and a cat"], 520)
    samples = [(torch.zeros(3, 4, 4), text, i, []) for i, text in enumerate(["a", "a dog and a cat"])]
    lengths = {}
    for multiple in (1, 8, -1):
        batch = Collator(tokenizer, 40, multiple)(samples)
        lengths[multiple] = batch["input_ids"].shape[1]
        assert batch["attention_mask"].sum(1).tolist() == [
            len(tokenizer(text)["input_ids"]) for _, text, _, _ in samples
        ]
    longest = len(tokenizer("a dog and a cat")["input_ids"])
    assert lengths == {1: longest, 8: -(-longest // 8) * 8, -1: 40}


@pytest.mark.parametrize("groups", [2, 4, 16])
def test_grouped_texts_have_the_same_embeddings_and_gradients(recipe, groups):
    from training.trainer import Trainer

    trainer = Trainer(parse_config(["--config", str(recipe())]))
    encoder, batch = trainer.encoder.eval(), next(iter(trainer.dataloader))
    inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask", "lengths")}
    assert len(set(batch["lengths"])) > 3
    results = []
    for encoder.text_groups in (1, groups):
        encoder.zero_grad()
        images, texts, scale, _ = encoder(**inputs)
        (scale * images @ texts.T).softmax(1).diagonal().sum().backward()
        results.append([texts, *(p.grad.clone() for p in encoder.model.text_model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_held_out_slice_is_never_trained_on(recipe, forms, tmp_path):
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
    assert state["log_u"].isfinite().sum(1).tolist() == [64, 64]  # FastCLIP has met those, and no other
    refused = pretrain(path, "--validation_samples", "100", "--output_dir", tmp_path / "other")
    assert refused.returncode == 1 and "are not below the 100 pairs" in refused.stderr
