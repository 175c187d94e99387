"""eval/apps/clip_benchmark_models.py: embeddings, and CLIP_benchmark's results beside ours on the same data."""

import json

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from eval.apps.clip_benchmark_models import load_amorlip
from modeling_amorlip.embedder_amorlip import encode_images, encode_texts
from tests.helpers.checkout import run
from tests.helpers.tasks import write_classification


def test_embeddings_equal_our_evaluation(tiny_model, emoji_files):
    model, transform, tokenizer = load_amorlip(str(tiny_model))
    reference = AutoModel.from_pretrained(tiny_model).eval(), AutoProcessor.from_pretrained(tiny_model)
    images = [Image.open(path) for path in sorted(emoji_files.rglob("*.png"))[:9]]
    texts = ["a red heart", "an airplane"]
    with torch.no_grad():
        image_embeds = model.encode_image(torch.stack([transform(image) for image in images]))
        text_embeds = model.encode_text(tokenizer(texts).to("cpu"))
    normalize = torch.nn.functional.normalize
    torch.testing.assert_close(normalize(image_embeds, dim=-1), encode_images(*reference, images))
    torch.testing.assert_close(normalize(text_embeds, dim=-1), encode_texts(*reference, texts))


@pytest.mark.e2e
def test_clip_benchmark_gives_our_results(tiny_model, tmp_path):
    pytest.importorskip("clip_benchmark")
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = [Image.fromarray((16 * x.reshape(8, 8)).clip(0, 255).astype(np.uint8)) for x in images[:200]]
    classes = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    write_classification(tmp_path / "wds_digits", images, labels[:200], classes, ["a {c}.", "number {c}"])
    (tmp_path / "digits.yaml").write_text("digits: {repositories: [clip-benchmark/wds_digits]}")

    result = run(
        "eval/run.py",
        "--model",
        tiny_model,
        "--tasks",
        tmp_path / "digits.yaml",
        "--data_dir",
        tmp_path,
        "--output",
        tmp_path / "ours.json",
        "--bootstrap",
        0,
    )
    assert result.returncode == 0, result.stderr
    ours = json.loads((tmp_path / "ours.json").read_text())["tasks"]["digits"]["metrics"]
    result = run(
        "eval/apps/clip_benchmark_models.py",
        "eval",
        "--model_type",
        "amorlip",
        "--model",
        tiny_model,
        "--pretrained",
        "",
        "--dataset",
        "wds/digits",
        "--dataset_root",
        tmp_path / "wds_digits",
        "--task",
        "zeroshot_classification",
        "--no_amp",
        "--num_workers",
        0,
        "--output",
        tmp_path / "theirs.json",
    )
    assert result.returncode == 0, result.stderr
    theirs = json.loads((tmp_path / "theirs.json").read_text())["metrics"]
    for name in ("acc1", "acc5", "mean_per_class_recall"):
        assert theirs[name] == pytest.approx(ours[name]["value"], abs=1e-9)
    assert 0 < ours["acc1"]["value"] < 1
