"""The demo: a short run always, the whole one with `pytest -m slow`.

DEMO_MODEL names the folder of a whole run that has been made, to check instead of a new one.
"""

import contextlib
import io
import json
import os
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from eval.models import load_model
from eval.runner import evaluate_task
from eval.tasks import load_task
from tests.helpers.checkout import DEMO, ROOT, run
from tests.helpers.runs import read_metrics, train


pytestmark = pytest.mark.e2e  # whole runs
RECIPE = ROOT / "training/recipes/emoji_demo.yaml"
SHORT = ["--train_data", str(DEMO / "train.parquet"), "--max_steps", "6", "--warmup_steps", "1", "--log_every", "2"]


@pytest.fixture(scope="module")
def short(training_curves, tmp_path_factory):
    """The folder of a short run, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("demo") / "model", io.StringIO()
    with contextlib.redirect_stdout(printed):
        train(RECIPE, "--output_dir", folder, *SHORT)
    return folder, printed.getvalue()


def test_trains_evaluates_and_draws(short):
    folder, printed = short
    assert "(nearest pixels, acc1)           5.03" in printed
    for picture in ("emoji_openmoji.png", "training_curves.png"):
        assert Image.open(folder / picture).size[0] > 400
    (result,) = json.loads((folder / "eval.jsonl").read_text())["results"]
    assert set(result["scores"]["cosine"]) >= {"acc1", "acc5", "text_retrieval_recall@1", "image_retrieval_recall@10"}


def test_data_card_says_how_to_load_it():
    for name, split, rows in ((None, "train", 5118), ("openmoji", "test", 1630)):
        assert len(datasets.load_dataset(str(DEMO), name, split=split)) == rows


def test_two_processes(short, tmp_path):
    options = ["--output_dir", tmp_path / "two", "--per_device_train_batch_size", "32", "--eval_tasks", "[]"]
    result = run("training/pretrain.py", "--config", RECIPE, *SHORT, *options, launch=2)
    assert result.returncode == 0, result.stderr
    # Batch normalization sees half the batch in each process, so the losses are similar but not equal.
    for a, b in zip(read_metrics(short[0]), read_metrics(tmp_path / "two"), strict=True):
        assert b["samples_seen"] == a["samples_seen"]
        assert b["loss"] == pytest.approx(a["loss"], abs=0.3)


def test_command_line_gives_the_trainers_results(short, tmp_path):
    output = tmp_path / "results.json"
    result = run("eval/run.py", "--model", short[0], "--tasks", "emoji_openmoji", "--output", output)
    assert result.returncode == 0, result.stderr
    entry = json.loads(output.read_text())["tasks"]["emoji_openmoji"]
    assert entry["status"] == "complete" and entry["num_samples"] == 1630
    (result,) = json.loads((short[0] / "eval.jsonl").read_text())["results"]
    values, expected = ({n: m["value"] for n, m in r["scores"]["cosine"].items()} for r in (entry, result))
    assert values == expected


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a whole run, and what it has of the demo's task."""
    folder = Path(os.environ.get("DEMO_MODEL", tmp_path_factory.mktemp("demo") / "model"))
    if not folder.exists():
        result = run("training/pretrain.py", "--config", RECIPE, "--output_dir", folder, threads=2, timeout=3600)
        assert result.returncode == 0, result.stderr
    (result,) = json.loads((folder / "eval.jsonl").read_text())["results"]
    return folder, result


@pytest.mark.slow
def test_whole_demo(whole):
    metrics = whole[1]["scores"]["cosine"]
    assert metrics["acc1"]["value"] > max(0.10, whole[1]["pixel_baseline"]) and metrics["acc5"]["value"] > 0.25


class OnnxModel(torch.nn.Module):
    """The encoders of an exported folder, as the evaluation calls them."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, folder, config, suffix):
        super().__init__()
        onnxruntime = pytest.importorskip("onnxruntime")
        self.config, self.sessions = config, {}
        for name in ("vision", "text"):
            self.sessions[name] = onnxruntime.InferenceSession(folder / f"onnx/{name}_model{suffix}.onnx")

    def _run(self, name, inputs):
        (embeds,) = self.sessions[name].run(None, {key: value.numpy() for key, value in inputs.items()})
        return torch.tensor(embeds)

    def get_image_features(self, **inputs):
        return self._run("vision", inputs)

    def get_text_features(self, **inputs):
        return self._run("text", inputs)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["", "_quantized"])
def test_exported_demo_keeps_its_accuracy(whole, tmp_path, suffix):
    """With 8-bit weights as well, within half a point."""
    folder, result = whole
    command = ("-m", "modeling_amorlip.export_amorlip", "--model", folder, "--output", tmp_path, "--quantize")
    assert run(*command).returncode == 0
    model, processor = load_model(str(folder))
    onnx_model = OnnxModel(tmp_path, model.config, suffix)
    exported = evaluate_task(onnx_model, processor, load_task("emoji_openmoji"), resamples=0)
    print(f"acc1{suffix}: {exported.value:.4f}, {result['scores']['cosine']['acc1']['value']:.4f} before the export")
    assert abs(exported.value - result["scores"]["cosine"]["acc1"]["value"]) < 0.005
