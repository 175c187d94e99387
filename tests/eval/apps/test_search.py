"""eval/apps/search.py: scores against brute force, the index, and the command line."""

import copy
import csv
import json
import math
import os
import sys
import warnings

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

from eval.apps.outputs import printable
from eval.apps.search import SearchResult, check_scoring, draw_sheet, main, search
from eval.scoring import SCORINGS
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


@pytest.mark.parametrize("scoring", ["cosine", "exact", "amortized"])
def test_search_ranks_as_brute_force(call, loaded, emoji_files, tmp_path, scoring):
    model, processor = loaded
    (emoji_files / "odd/$broken$.png").write_bytes((emoji_files / "odd/abacus.png").read_bytes()[:200])
    (emoji_files / "notes.txt").write_text("no image")
    paths = sorted(p for p in emoji_files.rglob("*.png") if "$" not in p.name)
    (tmp_path / "queries.txt").write_text("\n\n".join(SAMPLE) + "\n")

    outputs = brute_force(model, processor, paths, QUERIES)
    scale = model.logit_scale.exp().detach()
    expected = outputs.logits_per_text / scale
    if scoring == "exact":
        others = brute_force(model, processor, paths, SAMPLE).logits_per_text.double()
        kept = [[text != query for text in SAMPLE] for query in QUERIES]
        expected = expected - torch.stack([others[rows].exp().sum(0).log() for rows in kept]) / scale
    elif scoring == "amortized":
        expected = model.log_prob_per_image(outputs).T / scale
    order = expected.argsort(descending=True)[:, :7]

    options = ["--queries", tmp_path / "queries.txt"] if scoring == "exact" else []
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


def test_exact_scoring_demotes_hub_image(loaded):
    """An image close to all queries comes first by cosine, but not relative to its average score."""
    model, processor = loaded
    texts = torch.nn.functional.normalize(
        model.get_text_features(**processor.tokenizer(QUERIES, padding=True, return_tensors="pt")).pooler_output, dim=-1
    ).detach()
    hub = torch.nn.functional.normalize(texts.mean(0), dim=0)
    away = texts - (texts @ hub)[:, None] * hub  # of each query what the others have not
    images = torch.cat([hub[None], torch.nn.functional.normalize(away, dim=-1)])
    assert search(model, processor, QUERIES, images).argmax(1).tolist() == [0, 0, 0]
    assert search(model, processor, QUERIES, images, "exact").argmax(1).tolist() == [1, 2, 3]


def test_exact_scoring_ranks_by_probability_of_query(loaded):
    """Even where the probability is so close to 1 that float32 cannot represent the difference."""
    model, processor = copy.deepcopy(loaded[0]), loaded[1]
    model.logit_scale.data.fill_(math.log(100))
    images = torch.nn.functional.normalize(torch.randn(50, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    logits = 100 * encode_texts(model, processor, QUERIES).double() @ images.double().T
    for i, scores in enumerate(search(model, processor, QUERIES, images, "exact")):
        others = torch.cat([logits[:i], logits[i + 1 :]]).logsumexp(0)
        log_probability = -torch.log1p((others - logits[i]).exp())
        assert scores.argsort(descending=True).tolist() == log_probability.argsort(descending=True).tolist()


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
        (["--queries", folder / "one.txt"], "--queries is for --scoring exact and sinkhorn"),
        (["--scoring", "gallery", "--queries", folder / "nothing.txt"], "nothing.txt cannot be read"),
        (["--index", folder / "weights.safetensors"], "weights.safetensors is not an index of images"),
        (["--index", folder / "cut.safetensors"], "cut.safetensors cannot be read"),
        (["--images", folder / "nowhere"], "nowhere: there is no such folder"),
        (["--images", folder / "empty"], "empty holds no image that the decoder reads"),
        (["--images", folder / "broken"], "None of the 1 images"),
        (["--top", 0], "must be 1 or more"),
        (["--output", folder / "a.txt"], "name a file that ends in .csv or .json"),
        (["--output", folder / "no/such/a.csv"], "no/such does not exist"),
        (["--sheet", folder / "a.gif"], "name a file that ends in .png"),
        (["--sheet", folder / "a.png", "--top", 1201], "201 rows, 200 at most"),
        (["--index", folder], "is not a file"),
        ([""], "A query is empty"),
        ([os.fsdecode(b"caf\xe9")], "is not valid UTF-8"),
        ([folder / "broken/a.JPG"], "a.JPG cannot be read: it is not an image"),
        (["http://127.0.0.1:9/a.png"], "http://127.0.0.1:9/a.png cannot be read: Connection refused"),
        (["--scoring", "gallery", folder / "broken/a.JPG", "a dog"], "search with pictures by cosine"),
    ]


def test_search_reports_mistakes(call, emoji_files, tmp_path):
    for options, message in mistakes(tmp_path):
        status, _, errors = call("--images", emoji_files, *options, "a cat")
        assert status == 1 and message in errors.splitlines()[-1]
    with safe_open(tmp_path / "weights.safetensors", "pt") as weights:  # not written over
        assert list(weights.keys()) == ["weight"]


def test_amortized_scoring_needs_heads(loaded):
    check_scoring(loaded[0], "amortized", ["a cat"])
    with pytest.raises(UserError, match="amortizer heads"):
        check_scoring(loaded[0].vision_model, "amortized", ["a cat"])


def test_search_by_picture_finds_the_picture(call, emoji_files, monkeypatch):
    picture = emoji_files / "odd/abacus.png"
    monkeypatch.chdir(emoji_files)
    status, printed, errors = call("--images", emoji_files, "odd/abacus.png", "an anchor", "--top", 2)
    assert status == 0, errors
    lines = printed.splitlines()
    assert lines[0] == "odd/abacus.png" and lines[1].split(maxsplit=2) == ["1", "1.0000", str(picture)]
    _, alone, _ = call("--images", emoji_files, "an anchor", "--top", 2)
    assert lines[3:] == alone.splitlines()
    status, printed, errors = call("--images", emoji_files, "nowhere.png", "--top", 1)
    assert status == 0 and "nowhere.png is no file; searching for it as words" in errors


def test_exclude_leaves_the_query_alone(call, emoji_files):
    status, printed, errors = call("--images", emoji_files, "--exclude", "odd", "--exclude", "x*", "a cat", "--top", 40)
    assert status == 0, errors
    lines = printed.splitlines()
    assert lines[0] == "a cat" and len(lines) == 21 and not any("/odd/" in line for line in lines)


def test_search_without_query_updates_the_index(call, emoji_files, tmp_path):
    status, printed, errors = call("--images", emoji_files, "--index", tmp_path / "i.safetensors")
    assert status == 0 and printed == f"40 images in the index {tmp_path / 'i.safetensors'}\n", errors
    status, _, errors = call("--images", emoji_files, "--index", tmp_path / "i.safetensors", "--exclude", "odd")
    assert status == 0 and "20 images in the index, 0 to encode" in errors
    for options in (["--sheet", tmp_path / "a.png"], ["--output", tmp_path / "a.csv"], ["--scoring", "amortized"]):
        status, _, errors = call("--images", emoji_files, *options)
        assert status == 1 and "need a query" in errors.splitlines()[-1]


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_search_writes_what_it_prints(call, emoji_files, tmp_path, suffix):
    os.rename(emoji_files / "odd/abacus.png", os.fsencode(emoji_files) + b"/caf\xe9.png")
    output = tmp_path / f"results.{suffix}"
    status, printed, errors = call("--images", emoji_files, *QUERIES, "--top", 40, "--output", output)
    assert status == 0, errors
    with output.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = json.load(file) if suffix == "json" else list(csv.DictReader(file))
    assert len(rows) == 120 and any(os.fsencode(row["image"]).endswith(b"caf\xe9.png") for row in rows)
    lines = iter(printed.splitlines())
    for row in rows:
        if int(row["rank"]) == 1:
            assert next(lines) == row["query"]
        assert next(lines) == f"{int(row['rank']):4d}  {float(row['score']):7.4f}  {printable(row['image'])}"
    assert next(lines, None) is None


def test_index_is_reused_while_the_revision_is_the_same(call, emoji_files, monkeypatch):
    """A model named on the Hub is identified by its commit."""
    commits = iter(["a" * 40, "a" * 40, "b" * 40, None])
    monkeypatch.setattr("eval.apps.search.revision", lambda name, model: next(commits))
    for number in (40, 0, 40, 40):
        status, _, errors = call("--images", emoji_files, "a cat")
        assert status == 0 and f"{number} to encode" in errors


def test_sheet_leaves_out_images_that_are_gone(emoji_files, tmp_path, capsys):
    paths = [emoji_files / "even/airplane.png", emoji_files / "日本.png", emoji_files / "gone.png"]
    paths[1].write_bytes(paths[0].read_bytes())
    results = [SearchResult("日本 $x$\n", rank, 0.5, str(path)) for rank, path in enumerate(paths, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_sheet(tmp_path / "sheet.png", results)
    assert Image.open(tmp_path / "sheet.png").size[0] > 1000
    assert f"left out of the sheet: {paths[2]}: No such file" in capsys.readouterr().err


def test_repeated_queries_count_once(loaded):
    images = torch.nn.functional.normalize(torch.randn(9, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    scores = search(*loaded, QUERIES, images, "exact")
    repeated = search(*loaded, [*QUERIES, QUERIES[0]], images, "exact")
    torch.testing.assert_close(repeated, scores[[0, 1, 2, 0]])


@pytest.mark.parametrize("scoring", SCORINGS)
def test_every_scoring_corrects_images_alike_for_all_queries(loaded, scoring):
    """Apart from `exact`, which leaves out the query itself, a correction depends on the image only."""
    images = torch.nn.functional.normalize(torch.randn(9, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    corrections = search(*loaded, QUERIES, images) - search(*loaded, QUERIES, images, scoring, SAMPLE)
    assert corrections.shape == (3, 9) and corrections.isfinite().all()
    if scoring != "exact":
        torch.testing.assert_close(corrections, corrections[:1].expand(3, 9))
    assert (scoring == "cosine") == bool((corrections == 0).all())
