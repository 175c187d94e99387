"""eval/apps/search.py: scores against brute force, the index, and the command line."""

import copy
import json
import math
import os
import sys

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

from eval.apps import image_index
from eval.apps.image_files import read_image
from eval.apps.image_index import index_images
from eval.apps.search import check_scoring, main, search
from modeling_amorlip.cli_amorlip import UserError
from modeling_amorlip.embedder_amorlip import encode_texts


QUERIES = ["an airplane", "a red heart", "a button"]
SAMPLE = ["alien", "an anchor", "angry face", "an ant", "a red heart"]


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return AutoModel.from_pretrained(tiny_model).eval(), AutoProcessor.from_pretrained(tiny_model)


def convert_to_rgb(path):
    image = Image.open(path)
    return Image.composite(image.convert("RGB"), Image.new("RGB", image.size, "white"), image.getchannel("A"))


def brute_force(model, processor, paths, texts):
    """Outputs of one forward pass over all pairs."""
    inputs = processor(images=[convert_to_rgb(p) for p in paths], text=texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs)


@pytest.fixture
def call(tiny_model, monkeypatch, capsys):
    """Calls the command line in this process; returns its exit status, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["search.py", "--model", str(tiny_model), *map(str, arguments)])
        status = main()
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("scoring", ["cosine", "gallery", "amortized"])
def test_search_ranks_as_brute_force(call, loaded, emoji_files, tmp_path, scoring):
    model, processor = loaded
    (emoji_files / "odd/$broken$.png").write_bytes((emoji_files / "odd/abacus.png").read_bytes()[:200])
    (emoji_files / "notes.txt").write_text("no image")
    paths = sorted(p for p in emoji_files.rglob("*.png") if "$" not in p.name)
    (tmp_path / "queries.txt").write_text("\n\n".join(SAMPLE) + "\n")

    outputs = brute_force(model, processor, paths, QUERIES)
    scale = model.logit_scale.exp().detach()
    expected = outputs.logits_per_text / scale
    if scoring == "gallery":
        others = brute_force(model, processor, paths, SAMPLE).logits_per_text.double()
        kept = [[text != query for text in SAMPLE] for query in QUERIES]
        expected = expected - torch.stack([others[rows].exp().sum(0).log() for rows in kept]) / scale
    elif scoring == "amortized":
        expected = model.log_prob_per_image(outputs).T / scale
    order = expected.argsort(descending=True)[:, :7]

    options = ["--queries", tmp_path / "queries.txt"] if scoring == "gallery" else []
    options += ["--top", 7, "--scoring", scoring, "--sheet", tmp_path / "sheet.png"]
    status, printed, errors = call("--images", emoji_files, *QUERIES, *options)
    assert status == 0, errors
    assert f"skipped {emoji_files}/odd/$broken$.png" in errors
    lines = iter(printed.splitlines())
    for query, best, scores in zip(QUERIES, order, expected, strict=True):
        assert next(lines) == query
        for rank, i in enumerate(best.tolist(), 1):
            printed_rank, score, path = next(lines).split(maxsplit=2)
            assert (int(printed_rank), path) == (rank, str(paths[i]))
            assert float(score) == pytest.approx(scores[i].item(), abs=6e-5)
    assert next(lines, None) is None
    width, height = Image.open(tmp_path / "sheet.png").size
    assert width > 1000 and height > 800  # two rows for each of three queries
    with safe_open(tmp_path / "emoji.index.safetensors", "pt") as index:
        assert len(json.loads(index.get_tensor("stamps").numpy().tobytes())) == len(paths) == 40
        torch.testing.assert_close(index.get_tensor("image_embeds").norm(dim=1), torch.ones(40))


def test_gallery_scoring_demotes_hub_image(loaded):
    """An image close to all queries comes first by cosine, but not relative to its average score."""
    model, processor = loaded
    texts = torch.nn.functional.normalize(
        model.get_text_features(**processor.tokenizer(QUERIES, padding=True, return_tensors="pt")).pooler_output, dim=-1
    ).detach()
    hub = torch.nn.functional.normalize(texts.mean(0), dim=0)
    away = texts - (texts @ hub)[:, None] * hub  # of each query what the others have not
    images = torch.cat([hub[None], torch.nn.functional.normalize(away, dim=-1)])
    assert search(model, processor, QUERIES, images).argmax(1).tolist() == [0, 0, 0]
    assert search(model, processor, QUERIES, images, "gallery").argmax(1).tolist() == [1, 2, 3]


def test_gallery_scoring_ranks_by_probability_of_query(loaded):
    """Even where the probability is so close to 1 that float32 cannot represent the difference."""
    model, processor = copy.deepcopy(loaded[0]), loaded[1]
    model.logit_scale.data.fill_(math.log(100))
    images = torch.nn.functional.normalize(torch.randn(50, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    logits = 100 * encode_texts(model, processor, QUERIES).double() @ images.double().T
    for i, scores in enumerate(search(model, processor, QUERIES, images, "gallery")):
        others = torch.cat([logits[:i], logits[i + 1 :]]).logsumexp(0)
        log_probability = -torch.log1p((others - logits[i]).exp())
        assert scores.argsort(descending=True).tolist() == log_probability.argsort(descending=True).tolist()


def test_index_encodes_only_new_and_changed_images(loaded, tiny_model, emoji_files, tmp_path, capsys):
    model, processor = loaded[0], AutoProcessor.from_pretrained(tiny_model)
    file, encoded = tmp_path / "deep/er/index.safetensors", []
    count = model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(kwargs["pixel_values"])), with_kwargs=True
    )

    def update(revision="one"):
        encoded.clear()
        return (*index_images(model, processor, emoji_files, file, revision), sum(encoded))

    try:
        paths, embeds, number = update()
        assert number == len(paths) == 40
        again, same, number = update()
        assert number == 0 and again == paths and torch.equal(same, embeds)

        new, changed, touched, gone, moved = *paths[:2], *paths[10:12], emoji_files / "moved.png"
        new.with_name("new.png").write_bytes(new.read_bytes())
        changed.write_bytes(paths[5].read_bytes())
        os.utime(touched, ns=(1, 1))
        gone.rename(moved)
        after, embeds_after, number = update()
        assert number == 4 and set(after) == {*paths, new.with_name("new.png"), moved} - {gone}
        place, before = dict(zip(after, embeds_after, strict=True)), dict(zip(paths, embeds, strict=True))
        for path in set(paths) - {changed, gone}:
            torch.testing.assert_close(place[path], before[path])
        torch.testing.assert_close(place[new.with_name("new.png")], before[new])
        torch.testing.assert_close(place[changed], before[paths[5]])
        torch.testing.assert_close(place[moved], before[gone])

        capsys.readouterr()
        assert update("two")[2] == 41 and "another model" in capsys.readouterr().err
        processor.image_processor.image_mean = [0.1, 0.1, 0.1]
        assert update("two")[2] == 41
        assert update(None)[2] == update(None)[2] == 41  # no telling whether it is the same model
        assert not list(tmp_path.rglob(".*"))  # nothing left aside
    finally:
        count.remove()


def test_interrupted_indexing_continues(loaded, emoji_files, tmp_path, monkeypatch):
    model, processor = loaded
    monkeypatch.setattr(image_index, "SAVE_EVERY", 16)
    calls, encode_files = [], image_index.encode_files

    def stop_at_the_third(model, processor, paths, batch_size):
        calls.append(len(paths))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode_files(model, processor, paths, batch_size)

    monkeypatch.setattr(image_index, "encode_files", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        index_images(model, processor, emoji_files, tmp_path / "index.safetensors", "one")
    index_images(model, processor, emoji_files, tmp_path / "index.safetensors", "one")
    assert calls == [16, 16, 8, 8]


def test_read_image_applies_exif_orientation(emoji_files, tmp_path):
    image = Image.open(emoji_files / "even/airplane.png").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to see it"
    image.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").tobytes() == image.tobytes()


def mistakes(folder):
    save_file({"weight": torch.zeros(2)}, folder / "weights.safetensors")
    (folder / "cut.safetensors").write_bytes(b"\x08\0\0")
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken/a.JPG").write_bytes(b"no image")
    (folder / "one.txt").write_text("a cat\n")
    return [
        (["--scoring", "gallery"], "compares with other queries"),
        (["--scoring", "gallery", "--queries", folder / "one.txt"], "compares with other queries"),
        (["--queries", folder / "one.txt"], "for --scoring gallery alone"),
        (["--scoring", "gallery", "--queries", folder / "nothing.txt"], "nothing.txt cannot be read"),
        (["--index", folder / "weights.safetensors"], "weights.safetensors is not an index of images"),
        (["--index", folder / "cut.safetensors"], "cut.safetensors cannot be read"),
        (["--images", folder / "nowhere"], "nowhere: there is no such folder"),
        (["--images", folder / "empty"], "empty holds no image that can be read"),
        (["--images", folder / "broken"], "None of the 1 images"),
        (["--top", 0], "must be 1 or more"),
    ]


def test_search_reports_mistakes(call, emoji_files, tmp_path):
    for options, message in mistakes(tmp_path):
        status, _, errors = call("--images", emoji_files, "a cat", *options)
        assert status == 1 and message in errors.splitlines()[-1]
    with safe_open(tmp_path / "weights.safetensors", "pt") as weights:  # not written over
        assert list(weights.keys()) == ["weight"]


def test_amortized_scoring_needs_heads(loaded):
    check_scoring(loaded[0], "amortized", ["a cat"])
    with pytest.raises(UserError, match="amortizer heads"):
        check_scoring(loaded[0].vision_model, "amortized", ["a cat"])
