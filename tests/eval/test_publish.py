"""Publishing through the real client to a Hub of our own, and what a stranger then gets."""

import json
import re
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModel, AutoProcessor

import modeling_amorlip  # noqa: F401
from eval.publish import read_results
from tests.helpers.checkout import ROOT, pretrain, run
from tests.helpers.hub_server import Hub, environment
from tests.helpers.shards import PLAIN, write_shards
from tests.helpers.tasks import write_classification


REPO = "user/tiny"


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def trained(recipe_factory, tmp_path_factory):
    """A tiny model, with the results of a real evaluation on a small task."""
    folder = tmp_path_factory.mktemp("trained")
    assert pretrain(recipe_factory(folder, max_steps=3, warmup_steps=1)).returncode == 0
    task = folder / "task.yaml"
    data = "data: demo_data/emoji/openmoji.parquet, texts: demo_data/emoji/openmoji.json"
    task.write_text(f"user/emoji: {{title: Emoji, {data}, size: 1630}}")
    results = folder / "results.json"
    command = ["eval/run.py", "--model", folder / "run", "--tasks", task, "--output", results, "--bootstrap", "20"]
    assert run(*command).returncode == 0
    return folder / "run", results


def publish(hub, trained, tmp_path, *options, repo=REPO, **settings):
    command = [sys.executable, "eval/publish.py", trained[0], "--repo_id", repo, "--results", trained[1], *options]
    env = environment(hub, tmp_path, **settings)
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


GUARD = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_amorlip", "training", "eval"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Absent())
"""


def stranger(hub, tmp_path, code):
    """Runs code in a fresh process with an empty cache where our packages cannot be imported."""
    home = tmp_path / "stranger"
    home.mkdir(exist_ok=True)
    (home / "script.py").write_text(GUARD + code)
    env = environment(hub, home, token="hf_other")
    return subprocess.run([sys.executable, "script.py"], cwd=home, env=env, capture_output=True, text=True, timeout=180)


def test_a_stranger_can_use_what_was_published(hub, trained, tmp_path, demo_rows):
    result = publish(hub, trained, tmp_path)
    assert result.returncode == 0, result.stderr
    commit, files = hub.repositories[REPO].at("main")
    assert result.stdout.strip().endswith(commit)
    promised = {
        "README.md",
        "LICENSE",
        "config.json",
        "model.safetensors",
        "modeling_amorlip.py",
        "kernels_amorlip.py",
        "tokenizer.json",
        "run_config.yaml",
        "metrics.jsonl",
        "results.json",
        "training_curves.png",
    }
    assert promised <= set(files) and not any("checkpoints" in name or name.startswith(".lock") for name in files)
    assert str(trained[0].parent).encode() not in files["README.md"] + files["run_config.yaml"]
    metadata = yaml.safe_load(files["README.md"].decode().split("---")[1])
    report = json.loads(trained[1].read_text())["tasks"]["user/emoji"]
    (indexed,) = metadata["model-index"][0]["results"]
    assert indexed["metrics"][0]["value"] == round(100 * report["metrics"]["acc1"]["value"], 2)

    demo_rows[0]["image"].convert("RGB").save(tmp_path / "picture.png")
    result = stranger(
        hub,
        tmp_path,
        f"""
import numpy, torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline
model = AutoModel.from_pretrained("{REPO}", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("{REPO}", trust_remote_code=True)
image = Image.open("{tmp_path}/picture.png")
inputs = processor(images=image, text=["a heart", "a dog"], padding=True, return_tensors="pt")
with torch.inference_mode():
    outputs = model(**inputs)
numpy.savez("embeds.npz", image=outputs.image_embeds, text=outputs.text_embeds)
classify = pipeline("zero-shot-image-classification", model="{REPO}", trust_remote_code=True)
print(classify(image, candidate_labels=["heart", "dog"], hypothesis_template="{{}}"))
""",
    )
    assert result.returncode == 0, result.stderr
    assert "'score'" in result.stdout
    from PIL import Image

    model, processor = AutoModel.from_pretrained(trained[0]).eval(), AutoProcessor.from_pretrained(trained[0])
    inputs = processor(
        images=Image.open(tmp_path / "picture.png"), text=["a heart", "a dog"], padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        outputs = model(**inputs)
    theirs = np.load(tmp_path / "stranger/embeds.npz")
    np.testing.assert_array_equal(theirs["image"], outputs.image_embeds)
    np.testing.assert_array_equal(theirs["text"], outputs.text_embeds)

    snippet = re.search(r"```python\n(.*?)```", files["README.md"].decode(), re.S).group(1)
    result = stranger(hub, tmp_path, snippet)
    assert result.returncode == 0 and result.stdout.count("tensor") == 2, result.stderr


def test_a_second_push_changes_nothing(hub, trained, tmp_path):
    for _ in range(2):
        assert publish(hub, trained, tmp_path).returncode == 0
    assert len(hub.repositories[REPO].commits) == 2  # the initial one and ours


def test_private_branches_and_pull_requests(hub, trained, tmp_path):
    assert publish(hub, trained, tmp_path, "--private", "--revision", "draft").returncode == 0
    repository = hub.repositories[REPO]
    assert repository.private and not repository.at("main")[1] and "config.json" in repository.at("draft")[1]
    result = publish(hub, trained, tmp_path, "--create_pr")
    assert result.returncode == 0 and result.stdout.strip().endswith("/discussions/1")
    assert not repository.at("main")[1] and "config.json" in repository.at("refs/pr/1")[1]


@pytest.mark.parametrize(
    "settings, repo, message",
    [
        ({"token": "hf_wrong"}, REPO, "the token is missing or wrong"),
        ({}, "stranger/tiny", "may not write to stranger/tiny"),
        ({"HF_HUB_OFFLINE": "1"}, REPO, "unset it"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, REPO, "could not be reached"),
    ],
)
def test_refusals_end_in_one_clear_message(hub, trained, tmp_path, settings, repo, message):
    result = publish(hub, trained, tmp_path, repo=repo, **settings)
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
    assert not hub.repositories


def test_a_server_that_dies_leaves_nothing_half_published(hub, trained, tmp_path):
    hub.uploads_until_death = 1
    result = publish(hub, trained, tmp_path)
    assert result.returncode == 1 and "the same command goes on" in result.stderr, result.stderr
    assert not hub.repositories[REPO].at("main")[1]
    hub.uploads_until_death = None
    assert publish(hub, trained, tmp_path).returncode == 0
    assert "model.safetensors" in hub.repositories[REPO].at("main")[1]


def upload(hub, tmp_path, name, folder):
    """A folder as a data set; validates the demo's data card on the way."""
    code = f"""
import huggingface_hub as h
h.HfApi().create_repo({name!r}, repo_type="dataset")
h.HfApi().upload_folder(repo_id={name!r}, repo_type="dataset", folder_path={str(folder)!r})
h.DatasetCard.load("demo_data/emoji/README.md").validate()
"""
    env = environment(hub, tmp_path / "uploader")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True, capture_output=True)


def test_training_reads_shards_of_the_hub(hub, recipe, demo_rows, tmp_path):
    rows = demo_rows.cast_column("image", datasets.Image(decode=False)).select(range(60))
    write_shards([{"image": row["image"], "caption": row["caption"]} for row in rows], tmp_path / "shards")
    upload(hub, tmp_path, "user/pairs", tmp_path / "shards")
    for source, code, said in (
        ("hf://datasets/user/pairs/{00000..00006}.tar", 0, "60 pairs of hf://datasets/user/pairs"),
        ("hf://datasets/user/absent/*.tar", 1, "cannot be had"),
    ):
        path = recipe(**PLAIN, train_data=source, max_steps=3, output_dir=str(tmp_path / f"run{code}"))
        result = subprocess.run(
            [sys.executable, "training/pretrain.py", "--config", path],
            cwd=ROOT,
            env=environment(hub, tmp_path / "reader"),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == code and said in result.stdout + result.stderr, result.stderr
        assert "Traceback" not in result.stderr


def test_tasks_are_read_straight_from_the_hub(hub, trained, demo_rows, tmp_path):
    data = tmp_path / "wds_pets"
    pictures = [row["image"] for row in demo_rows.select(range(10))]
    write_classification(data, pictures, [i % 3 for i in range(10)], ["heart", "star", "cat"])
    upload(hub, tmp_path, "user/wds_pets", data)
    task = tmp_path / "task.yaml"
    task.write_text("pets: {repositories: [user/absent, user/wds_pets], size: 10}")
    reports = []
    for folder in ("hub", tmp_path):
        output = tmp_path / f"{len(reports)}.json"
        command = ["--tasks", task, "--data_dir", folder, "--output", output]
        command = [sys.executable, "eval/run.py", "--model", trained[0], *command]
        env = environment(hub, tmp_path / "reader")
        result = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr + result.stdout
        reports.append(json.loads(output.read_text())["tasks"]["pets"])
    assert reports[0] == reports[1] and reports[0]["status"] == "complete"
    task.write_text("pets: {repositories: [user/absent]}")
    command[command.index("--data_dir") + 1] = "hub"
    command[-1] = tmp_path / "absent.json"
    result = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 1 and "user/absent cannot be read from the Hub" in result.stdout


def test_cards_without_a_hub(trained, tmp_path):
    card = tmp_path / "card.md"
    command = ["eval/publish.py", trained[0], "--repo_id", REPO, "--card_only", card]
    assert run(*command).returncode == 0 and "It has not been evaluated" in card.read_text()
    line = {"step": 3, "results": [{"task": "emoji_openmoji", "metric": "acc1", "value": 0.25, "num_samples": 4}]}
    (tmp_path / "eval.jsonl").write_text(json.dumps(line))
    ((row,), _) = read_results(tmp_path, None)
    assert (row.metric, row.value, row.num_samples) == ("acc1", 0.25, 4)
    for folder, results, message in ((tmp_path, trained[1], "holds no model"), (trained[0], card, "is not what")):
        result = run("eval/publish.py", folder, "--repo_id", REPO, "--results", results, "--card_only", card)
        assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
