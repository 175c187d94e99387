"""eval/apps/classify.py: probabilities against the model's own logits, and the command line."""

import csv
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from eval.apps.classify import embed_labels, label_probabilities, main
from modeling_amorlip import AmorLIPConfig, AmorLIPModel
from modeling_amorlip.embedder_amorlip import encode_images


LABELS = ["airplane", "anchor", "angry face", "red, blue"]


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return AutoModel.from_pretrained(tiny_model).eval(), AutoProcessor.from_pretrained(tiny_model)


def logits(model, processor, images, texts):
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits_per_image


def opaque(folder):
    """Images without transparency, as the processor can take them."""
    return [p for p in sorted(folder.rglob("*.png")) if Image.open(p).getchannel("A").getextrema() == (255, 255)]


@pytest.fixture
def call(tiny_model, monkeypatch, capsys):
    """Calls the command line in this process; returns its exit status, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["classify.py", "--model", str(tiny_model), *map(str, arguments)])
        status = main()
        return status, *capsys.readouterr()

    return run


def test_classify_gives_softmax_of_logits(call, loaded, emoji_files, tmp_path):
    for path in set(emoji_files.rglob("*.png")) - set(opaque(emoji_files)):
        path.unlink()
    (emoji_files / "broken.png").write_bytes(b"no image")
    folder = opaque(emoji_files / "even")
    single = opaque(emoji_files / "odd")[0]
    (tmp_path / "labels.txt").write_text("\n".join(["", *LABELS[2:], LABELS[0]]), encoding="utf-8-sig")
    output = tmp_path / "labels.csv"
    options = ["--labels_file", tmp_path / "labels.txt", "--template", "an emoji of {}", "--top", 3, "--output", output]
    sources = [single, emoji_files / "even", emoji_files / "broken.png"]
    status, printed, errors = call(*sources, "--labels", *LABELS[:2], *options)
    assert status == 0, errors
    assert f"skipped {emoji_files}/broken.png" in errors

    paths = [single, *folder]
    images = [Image.open(p).convert("RGB") for p in paths]
    expected = logits(*loaded, images, [f"an emoji of {label}" for label in LABELS]).softmax(-1)
    with output.open(newline="", encoding="utf-8") as file:
        rows = iter(list(csv.DictReader(file)))
    lines = iter(printed.splitlines())
    for path, probabilities in zip(paths, expected, strict=True):
        assert next(lines) == str(path)
        for rank, i in enumerate(probabilities.argsort(descending=True).tolist()[:3], 1):
            row = next(rows)
            assert (row["image"], row["rank"], row["label"]) == (str(path), str(rank), LABELS[i])
            assert float(row["probability"]) == pytest.approx(probabilities[i].item(), abs=1e-5)
            assert next(lines) == f"{100 * float(row['probability']):6.2f} %  {LABELS[i]}"
    assert next(rows, None) is next(lines, None) is None


def test_model_with_logit_bias_judges_labels_independently(loaded, tiny_model, emoji_files):
    torch.manual_seed(0)
    config = AmorLIPConfig.from_pretrained(tiny_model, logit_bias_init_value=-1.5)
    model, processor = AmorLIPModel(config).eval(), loaded[1]
    images = [Image.open(p).convert("RGB") for p in opaque(emoji_files)[:4]]
    embeds = encode_images(model, processor, images)
    for labels in (LABELS, LABELS[:1]):  # also a single one
        probabilities = label_probabilities(model, embeds, embed_labels(model, processor, labels, "{}"))
        expected = logits(model, processor, images, labels).sigmoid()
        torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-5)


def mistakes(folder):
    labels = ["--labels", "a cat", "a dog"]
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "latin.txt").write_bytes("garçon".encode("latin-1"))
    picture = folder / "emoji/even/airplane.png"
    return [
        ([*labels, picture], "No images given"),  # taken for a label
        ([folder / "nowhere.png", *labels], "nowhere.png: there is no such file or folder"),
        ([folder / "broken.png", *labels], "None of the 1 images can be read"),
        ([picture], "0 labels given, 2 or more are needed"),
        ([picture, "--labels", "a cat", "a cat"], "1 labels given, 2 or more are needed"),
        ([picture, "--labels_file", folder / "latin.txt"], "latin.txt cannot be read as UTF-8"),
        ([picture, *labels, "--template", "a photo"], "has no {} where the label goes"),
        ([picture, *labels, "--top", 0], "must be 1 or more"),
        ([picture, *labels, "--output", folder / "no/such/folder.csv"], "no/such does not exist"),
    ]


def test_classify_reports_mistakes(call, emoji_files, tmp_path):
    for arguments, message in mistakes(tmp_path):
        status, _, errors = call(*arguments)
        assert status == 1 and message in errors.splitlines()[-1]
