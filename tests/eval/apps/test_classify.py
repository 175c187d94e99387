"""eval/apps/classify.py: probabilities against the model's own logits, and the command line."""

import csv
import io
import os
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, SiglipConfig, SiglipModel

from eval.apps import image_files
from eval.apps.classify import best_labels, embed_labels, label_images, label_probabilities, main
from eval.apps.image_files import read_image
from modeling_amorlip import AmorLIPConfig, AmorLIPModel
from modeling_amorlip.convert_clip_to_amorlip import convert
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
        ([picture], "2 or more different labels, got 0"),
        ([picture, "--labels", "a cat", "a cat"], "2 or more different labels, got 1"),
        ([picture, "--labels_file", folder / "latin.txt"], "latin.txt cannot be read as UTF-8"),
        ([picture, *labels, "--template", "a photo"], "has no {} where the label goes"),
        ([picture, *labels, "--top", 0], "must be 1 or more"),
        ([folder / "*.gif", *labels], "the pattern matches no file"),
        (["", *labels], "is empty"),
        ([picture, "--labels", "a cat", " ", " a cat "], "2 or more different labels, got 1"),
        ([picture, "--labels", "a cat", os.fsdecode(b"caf\xe9")], "is not valid UTF-8"),
        ([picture, *labels, "--output", folder / "a.txt"], "name a file that ends in .csv or .json"),
        ([picture, *labels, "--output", "/dev/full"], "/dev/full cannot be written: No space left on device"),
        ([picture, *labels, "--output", folder / "no/such/folder.csv"], "no/such does not exist"),
    ]


def test_classify_reports_mistakes(call, emoji_files, tmp_path):
    for arguments, message in mistakes(tmp_path):
        status, _, errors = call(*arguments)
        assert status == 1 and message in errors.splitlines()[-1]


def test_classify_prints_and_writes_names_of_any_encoding(loaded, tiny_model, emoji_files, tmp_path, monkeypatch):
    path = os.fsencode(emoji_files) + b"/caf\xe9\n.png"
    os.rename(opaque(emoji_files)[0], path)
    output, stdout = tmp_path / "labels.csv", io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    arguments = [os.fsdecode(path), "--labels", "日本", "naïve", "--output", output]
    monkeypatch.setattr(sys, "argv", ["classify.py", "--model", str(tiny_model), *map(str, arguments)])
    assert main() == 0
    stdout.flush()
    lines = stdout.buffer.getvalue().decode("ascii").splitlines()
    assert len(lines) == 3 and lines[0].endswith("/caf\\udce9\\n.png")
    assert {line.split()[-1] for line in lines[1:]} == {"\\u65e5\\u672c", "na\\xefve"}
    with output.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert [os.fsencode(row["image"]) for row in rows] == [path, path]
    assert {row["label"] for row in rows} == {"日本", "naïve"}


def test_classify_takes_urls_and_globs(call, emoji_files, monkeypatch):
    image = opaque(emoji_files)[0]
    monkeypatch.setattr(image_files, "fetch", lambda url: image.read_bytes() if "good" in url else b"<html>")
    sources = ["https://example.org/good", "https://example.org/bad", emoji_files / "**" / image.name]
    status, printed, errors = call(*sources, "--labels", *LABELS)
    assert status == 0 and "skipped https://example.org/bad: it is not an image" in errors
    lines = printed.splitlines()
    assert len(lines) == 10 and lines[0] == sources[0] and lines[5] == str(image) and lines[1:5] == lines[6:]


def test_classify_names_labels_that_the_model_cannot_distinguish(call, emoji_files):
    image, long = opaque(emoji_files)[0], "a cat " * 40
    status, printed, errors = call(image, "--labels", "a dog", long + "one", long + "two", "an ant")
    assert status == 0
    warning = next(line for line in errors.splitlines() if line.startswith("warning: "))
    assert f"'{long}one' = '{long}two'" in warning and "dog" not in warning and "ant" not in warning
    probabilities = {line[10:]: line[:8] for line in printed.splitlines()[1:]}
    assert probabilities[long + "one"] == probabilities[long + "two"]
    assert "warning" not in call(image, "--labels", "a dog", "an ant")[2]


@pytest.mark.parametrize("converted", [False, True])
def test_siglip_gives_its_own_probabilities(tiny_model, emoji_files, tmp_path, converted):
    """Sigmoids over texts padded to the context and without a mask, as Transformers' model card has it."""
    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(tiny_model)
    processor.tokenizer.model_input_names = ["input_ids"]  # as SigLIP's tokenizers have it: no attention mask
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(processor.tokenizer), "max_position_embeddings": 16, "projection_size": 32}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    source = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    source.logit_scale.data.fill_(2.0)
    source.logit_bias.data.fill_(-1.0)
    source.save_pretrained(tmp_path / "siglip")
    images = [read_image(path) for path in opaque(emoji_files)[:3]]
    texts = processor.tokenizer(LABELS, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    with torch.no_grad():
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        expected = source(input_ids=texts["input_ids"], pixel_values=pixels).logits_per_image.sigmoid()
    model = convert(tmp_path / "siglip").model.eval() if converted else source
    embeds = embed_labels(model, processor, LABELS, "{}")
    probabilities = label_probabilities(model, encode_images(model, processor, images), embeds)
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-5)


def test_labels_do_not_depend_on_how_many_images_are_scored_at_a_time(loaded):
    model, processor = loaded
    label_embeds = embed_labels(model, processor, LABELS, "{}")
    images = torch.nn.functional.normalize(torch.randn(7, label_embeds.shape[1]), dim=-1)
    names = [f"{number}.png" for number in range(7)]
    embeds = dict(zip(names, images, strict=True))
    whole = best_labels(names, LABELS, label_probabilities(model, images, label_embeds), 2)
    tiled = label_images(model, embeds, LABELS, label_embeds, 2, tile_size=3)
    assert [(row.image, row.rank, row.label) for row in tiled] == [(row.image, row.rank, row.label) for row in whole]
    assert [row.probability for row in tiled] == pytest.approx([row.probability for row in whole])
