"""Each benchmark on little data, in this process where it starts none itself."""

from __future__ import annotations

import importlib
import json
import statistics
import sys

import pytest
import torch

from tests.helpers.checkout import TINY, run
from training.benchmarks.timing import time_in_turns


@pytest.fixture
def main(monkeypatch):
    """Runs a benchmark's command line in this process: main(name, option, ...) -> exit status."""
    threads = torch.get_num_threads()

    def call(name, *options):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
        return importlib.import_module(f"training.benchmarks.{name}").main()

    yield call
    torch.set_num_threads(threads)


def test_timing_takes_turns_and_leaves_out_warmup():
    calls: list[str] = []
    seconds = time_in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2, warmup_rounds=1)
    assert calls == ["a", "b"] * 3 and {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_loss_benchmark(main, monkeypatch, tmp_path):
    from training.benchmarks import loss

    monkeypatch.setattr(loss, "measure_memory_in_new_process", lambda name, n, settings: 1.5)
    output = tmp_path / "loss.json"
    assert main("loss", "--sizes", 128, 256, "--dim", 32, "--rounds", 1, "--output", output) == 0
    rows = json.loads(output.read_text())["results"]
    assert {(row["n"], row["name"]) for row in rows} >= {
        (n, name) for n in (128, 256) for name in ("ours", "straightforward", "infonce", "matrix_products")
    }
    assert all(row["peak_mb"] == 1.5 for row in rows if row["name"] != "matrix_products")
    assert output.with_suffix(".png").stat().st_size > 0


@pytest.mark.e2e
def test_gpu_benchmark_without_a_gpu(main, tmp_path, capsys):
    assert main("gpu", "--small", "--output", tmp_path / "gpu.json") == 0
    claims = json.loads((tmp_path / "gpu.json").read_text())["claims"]
    assert sum(claim["holds"] is True for claim in claims) >= 15 and not torch.distributed.is_initialized()
    if not torch.cuda.is_available():
        assert "262144 pairs, GiB                               not run" in capsys.readouterr().out


def test_gpu_benchmark_names_claims_that_fail(main, monkeypatch, capsys):
    from training.benchmarks import gpu

    monkeypatch.setattr(gpu, "CHECKS", [lambda setting: [gpu.at_most("error of x", float("nan"), 1)]])
    assert main("gpu", "--small") == 1
    assert "Failing     error of x" in capsys.readouterr().out


@pytest.mark.parametrize("groups", [("ours", "straightforward", "straightforward_kept"), ("infonce", "ours_infonce")])
def test_compared_losses_are_equal(groups):
    from training.benchmarks.loss import Settings, losses

    inputs = Settings(dim=32, device="cpu", dtype="float32", rounds=1, threads=1).inputs(64)
    values = [losses()[name](*inputs) for name in groups]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-4, atol=1e-4)


@pytest.mark.e2e
def test_loss_memory_does_not_grow_with_the_square():
    from training.benchmarks.loss import Settings, measure_memory_in_new_process

    settings = Settings(dim=32, device="cpu", dtype="float32", rounds=1, threads=1)
    assert 8 < measure_memory_in_new_process("ours", 8192, settings) < 50  # MB; a matrix of logits has 256


@pytest.mark.e2e
def test_heads_benchmark(main, tiny_model, small_data, tmp_path):
    output = tmp_path / "heads.json"
    options = ["--model", tiny_model, "--data", small_data, "--epochs", 1, "--size", 64, "--batch_size", 16]
    options += ["--output", output]
    assert main("heads", *options) == 0
    report = json.loads(output.read_text())
    assert len(report["results"]) == 3 * 5 + 1
    for row in report["results"]:
        assert row["rms"] > 0 and row["ratio"] == pytest.approx(row["rms"] / report["batch_rms"])
    short = ["--head_types", "residual_mlp", "--objectives", "conjugate"]
    assert main("heads", *options, *short, "--target_queue", 48) == 0
    (from_queue,) = json.loads(output.read_text())["results"]
    from_batch = next(r for r in report["results"] if (r["head_type"], r["objective"]) == ("residual_mlp", "conjugate"))
    assert from_queue["rms"] > 0 and from_queue["bias"] != from_batch["bias"]


def test_exact_log_partitions_and_errors():
    from training.benchmarks.heads import batch_error, error, exact_log_partitions

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(32, 8, generator=generator), dim=-1) for _ in range(2))
    scale = torch.tensor(10.0)
    logits = 10 * x.double() @ y.double().T
    expected = torch.stack([logits.exp().mean(1).log(), logits.exp().mean(0).log()])
    exact = exact_log_partitions(x, y, scale)
    torch.testing.assert_close(exact.double(), expected, rtol=1e-5, atol=1e-5)
    assert error(exact + torch.tensor([[1.0], [-2.0]]), exact) < 1e-5  # a constant per direction does not count
    offsets = torch.tensor([3.0, -3.0]).repeat(16)
    assert error(exact + offsets, exact) == pytest.approx(3.0, rel=1e-4)
    assert batch_error(x, y, scale, exact, 8) > batch_error(x, y, scale, exact, 32)


@pytest.mark.e2e
def test_data_benchmark(main, tmp_path):
    options = ["--images", 8, "--loader_images", 64, "--rounds", 1, "--output", tmp_path / "data.json"]
    assert main("data", *options) == 0
    report = json.loads((tmp_path / "data.json").read_text())
    assert report["loaders"][0]["name"] == "this project" and report["loaders"][0]["images_per_second"] > 0
    rows = report["results"]
    assert {row["name"] for row in rows} == {"plain", "ours", "ours, webdataset", "ours, parquet", "ours, folder"}
    assert all(row["images_per_second"] > 0 for row in rows)


def test_billion_pairs_benchmark(monkeypatch, tmp_path):
    from training.benchmarks import billion_pairs
    from training.data import index_cache

    monkeypatch.setattr(index_cache, "HF_HOME", str(tmp_path / "home"))
    billion_pairs.write_shards(tmp_path, 2)
    seconds = billion_pairs.measure_times(tmp_path, "shards")
    assert len(seconds) == 5 and all(value > 0 for value in seconds.values())
    assert len(list((tmp_path / "home/amorlip").glob("*.idx"))) == 2  # nothing was scanned again


@pytest.mark.e2e
def test_step_benchmark(main, monkeypatch, tmp_path, small_data):
    from training.benchmarks import step

    monkeypatch.setattr(step.subprocess, "run", lambda command, **_: run(*command[1:], launch=1))
    tiny = {key: TINY[key] for key in ("projection_dim", "vision_config", "text_config")}
    options = ["--objectives", "amorlip", "--batch_size", 16, "--steps", 2, "--rounds", 1]
    options += ["--overrides", json.dumps({"train_data": str(small_data), **tiny})]
    assert main("step", *options, "--output", tmp_path / "step.json") == 0
    report = json.loads((tmp_path / "step.json").read_text())
    assert [len(seconds) for seconds in report["seconds"].values()] == [2]
    (row,) = report["results"]
    assert row["median"] == statistics.median(report["seconds"]["amorlip"])


def test_steps_are_compared_with_the_first_objective():
    from training.benchmarks.step import summarize

    rows = summarize({"clip": [1.0, 2.0, 6.0], "amorlip": [3.0]})
    assert [(row["median"], row["ratio"], row["mean_ratio"]) for row in rows] == [(2.0, 1.0, 1.0), (3.0, 1.5, 1.0)]


def test_peers_benchmark(main, monkeypatch, tmp_path):
    from training.benchmarks import peers

    encoder = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(peers, "TEXT_CONFIG", {**peers.TEXT_CONFIG, **encoder})
    monkeypatch.setattr(peers, "VISION_CONFIG", {"patch_size": 112, **encoder})
    assert main("peers", "--batch_size", 4, "--rounds", 1, "--output", tmp_path / "peers.json") == 0
    report = json.loads((tmp_path / "peers.json").read_text())
    names = [row["variant"] for row in report["results"]]
    assert names[:4] == ["ours, grouped", "ours, trimmed", "ours, padded", "transformers"]
    assert all(row["samples_per_second"] > 0 for row in report["results"])
