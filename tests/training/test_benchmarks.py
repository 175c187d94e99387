"""Each benchmark in short, as a user starts it."""

import json

import pytest

from tests.helpers.checkout import TINY, pretrain, run


def test_loss_benchmark(tmp_path):
    output = tmp_path / "loss.json"
    result = run(
        "training/benchmarks/loss.py", "--sizes", "256", "512", "--dim", "32", "--rounds", "1", "--output", output
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(output.read_text())["results"]
    assert {row["n"] for row in rows} == {256, 512} and {"ours", "straightforward", "infonce"} <= {
        r["name"] for r in rows
    }
    assert all(row["seconds"] > 0 for row in rows) and output.with_suffix(".png").exists()


def test_our_memory_does_not_grow_with_the_square():
    result = run("training/benchmarks/loss.py", "--sizes", "8192", "--dim", "32", "--rounds", "1")
    assert result.returncode == 0, result.stderr
    peak = {line.split()[1]: float(line.split()[-1]) for line in result.stdout.splitlines()[1:] if "matrix" not in line}
    assert peak["ours"] < 50 < 256 < peak["infonce"]


def test_heads_benchmark(recipe, small_data, tmp_path):
    assert pretrain(recipe(max_steps=3)).returncode == 0
    output = tmp_path / "heads.json"
    short = ["--data", small_data, "--epochs", "1", "--size", "64", "--batch_size", "16", "--output", output]
    result = run("training/benchmarks/heads.py", "--model", tmp_path / "run", *short)
    assert result.returncode == 0, result.stderr
    report = json.loads(output.read_text())
    assert len(report["results"]) == 3 * 5 + 1
    result = run(
        "training/benchmarks/heads.py",
        "--model",
        tmp_path / "run",
        *short,
        "--target_queue",
        "48",
        "--head_types",
        "residual_mlp",
        "--objectives",
        "conjugate",
    )
    assert result.returncode == 0, result.stderr
    (from_queue,) = json.loads(output.read_text())["results"]
    from_batch = next(r for r in report["results"] if (r["head_type"], r["objective"]) == ("residual_mlp", "conjugate"))
    assert from_queue["rms"] > 0 and from_queue["bias"] != from_batch["bias"]
    for row in report["results"]:
        assert row["rms"] > 0 and row["ratio"] == pytest.approx(row["rms"] / report["batch_rms"])


def test_step_benchmark(tmp_path, small_data):
    tiny = {
        "train_data": str(small_data),
        "projection_dim": 32,
        "vision_config": TINY["vision_config"],
        "text_config": TINY["text_config"],
    }
    options = ["--batch_size", "16", "--steps", "2", "--rounds", "1", "--overrides", json.dumps(tiny)]
    result = run("training/benchmarks/step.py", *options, "--output", tmp_path / "step.json")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "step.json").read_text())
    assert [len(s) for s in report["seconds"].values()] == [2, 2]
    clip, amorlip = report["results"]
    assert clip["ratio"] == 1 and amorlip["ratio"] == amorlip["median"] / clip["median"]


def test_evaluation_benchmark(recipe, tmp_path):
    assert pretrain(recipe(max_steps=3)).returncode == 0
    output = tmp_path / "evaluation.json"
    options = ["--images", "200", "--batch_size", "64", "--rounds", "1", "--output", output]
    result = run("eval/benchmarks/evaluation.py", "--model", tmp_path / "run", *options)
    assert result.returncode == 0, result.stderr
    report = json.loads(output.read_text())
    assert report["ratio"] == report["loop"] / report["model"] and report["model"] > 0


def test_data_benchmark(tmp_path):
    result = run("training/benchmarks/data.py", "--images", "16", "--rounds", "3", "--output", tmp_path / "data.json")
    assert result.returncode == 0, result.stderr
    ratios = {row["name"]: row["ratio"] for row in json.loads((tmp_path / "data.json").read_text())["results"]}
    assert set(ratios) == {"plain", "ours", "ours, webdataset", "ours, parquet", "ours, folder"}
    assert ratios["plain"] == 1 and ratios["ours"] > 1.2  # 2.3 in a longer run


def test_peers_benchmark(tmp_path):
    options = ["--batch_size", "4", "--rounds", "1", "--output", tmp_path / "peers.json"]
    result = run("training/benchmarks/peers.py", *options)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "peers.json").read_text())
    names = [row["variant"] for row in report["results"]]
    assert names[:4] == ["ours, grouped", "ours, trimmed", "ours, padded", "transformers"]
    assert all(row["samples_per_second"] > 0 for row in report["results"])
