"""Publishing through the real client to a Hub of the tests' own, and what others get from there."""

import json

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import eval.publish
import modeling_amorlip  # noqa: F401
from eval.models import hash_files, load_model, weight_files
from eval.publish import publish
from eval.report import Metric, ModelRecord, Report, TaskResult
from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.hub_server import Repository
from tests.helpers.models import make_model, save_model
from tests.helpers.tasks import run_main


REPO = "user/tiny"
SECRET = "/home/someone/secret"


@pytest.fixture
def run_folder(tmp_path):
    """A finished run's folder, with files that must not be published, and paths in those that are."""
    folder = save_model(tmp_path / "run")
    settings = {"objective": "amorlip", "train_data": f"{SECRET}/pairs.tar", "output_dir": SECRET, "seed": 0}
    (folder / "run_config.yaml").write_text(yaml.safe_dump({**settings, "learning_rate": 0.001}))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (folder / "eval.jsonl").write_text(json.dumps({"step": 1, "results": [make_result().to_dict()]}) + "\n")
    (folder / "training_curves.png").write_bytes(b"png")
    for name in ("not_finite_0.safetensors", "bad_samples.jsonl", "loss_spikes.jsonl", "notes.txt", "emoji.png"):
        (folder / name).write_bytes(SECRET.encode())
    (folder / "checkpoints/step_1").mkdir(parents=True)
    (folder / "checkpoints/step_1/model.safetensors").write_bytes(b"0")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "name_or_path": f"{SECRET}/tokenizer"}))
    (folder / "spiece.model").write_bytes(b"sentencepiece")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def make_result(hub_dataset=None):
    scores = {"cosine": {"acc1": Metric(0.25, [0.2, 0.3])}, "exact": {"acc1": Metric(0.5)}}
    return TaskResult(
        *("emoji", "Emoji", f"{SECRET}/emoji.parquet", "test", "complete", "acc1", 4, 4),
        reason=f"4 cannot be read, the first is {SECRET}/a.png (cut off)",
        hub_dataset=hub_dataset,
        scores=scores,
    )


def write_results(folder, path, hub_dataset=None, config=""):
    model = ModelRecord(str(folder), "abc", 12, hash_files(weight_files(folder)), "p", "t", config)
    Report(model, ["cosine", "exact"], tasks={"emoji": make_result(hub_dataset)}).write(path)
    return path


def test_publishes_what_loading_needs_and_nothing_else(hub, run_folder, tmp_path):
    results = write_results(run_folder, tmp_path / "results.json")
    url = publish(run_folder, REPO, results)
    commit, files = hub.repositories[REPO].at("main")
    assert url.endswith(commit)
    code = {path.name for path in run_folder.glob("*_amorlip.py")}
    assert (
        set(files)
        == code
        | {
            *("README.md", "LICENSE", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
            *("processor_config.json", "spiece.model", "chat_template.jinja", "run_config.yaml", "metrics.jsonl"),
            *("eval.jsonl", "results.json", "training_curves.png"),
        }
        and len(code) > 2
    )
    for name, content in files.items():
        assert SECRET.encode() not in content and str(tmp_path).encode() not in content, name
    config = yaml.safe_load(files["run_config.yaml"])
    assert (config["train_data"], config["output_dir"], config["learning_rate"]) == ("pairs.tar", "secret", 0.001)
    reason = json.loads(files["results.json"])["tasks"]["emoji"]["reason"]
    assert reason == "4 cannot be read, the first is a.png (cut off)"
    assert files["model.safetensors"] == (run_folder / "model.safetensors").read_bytes()
    assert files["training_curves.png"].startswith(b"\x89PNG")  # drawn anew


def test_card_has_results_parameters_and_authors(hub, run_folder, tmp_path):
    publish(run_folder, REPO, write_results(run_folder, tmp_path / "results.json"))
    card = hub.repositories[REPO].at("main")[1]["README.md"].decode()
    assert "| Emoji | acc1 | cosine (inductive) | 25.00 | 20.00 – 30.00 | 4 |" in card
    assert "| Emoji | acc1 | exact (transductive) | 50.00 |  | 4 |" in card
    parameters = sum(p.numel() for p in make_model()[0].parameters())
    assert f"has {parameters / 1e6:.1f} million parameters" in card
    assert "Sun, Haotian and Li, Yitong and Zhuang, Yuchen and He, Niao and Dai, Hanjun and Dai, Bo" in card
    (indexed,) = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"]
    assert indexed["metrics"][0]["value"] == 25.0 and indexed["dataset"]["type"] == "local"
    assert ".eval_results/amorlip.yaml" not in hub.repositories[REPO].at("main")[1]


def test_results_on_hub_data_are_evaluation_entries(hub, run_folder, tmp_path):
    publish(run_folder, REPO, write_results(run_folder, tmp_path / "results.json", "user/emoji"))
    files = hub.repositories[REPO].at("main")[1]
    (entry,) = yaml.safe_load(files[".eval_results/amorlip.yaml"])
    assert (entry["dataset"]["id"], entry["value"]) == ("user/emoji", 25.0)


def test_second_push_changes_nothing(hub, run_folder):
    for _ in range(2):
        publish(run_folder, REPO)
    assert len(hub.repositories[REPO].commits) == 2  # the initial one and ours


def test_card_that_was_edited_on_the_hub_keeps_its_sections(hub, run_folder, tmp_path):
    publish(run_folder, REPO)
    repository = hub.repositories[REPO]
    files = dict(repository.at("main")[1])
    card = files["README.md"].decode()
    card = card.replace("license: apache-2.0", "license: mit\nlanguage: de").replace("- clip\n", "- clip\n- mine\n")
    card = card.replace("## Limits\n", "## Thanks\n\nTo everyone.\n\n## Limits\n\nOnly emoji.\n")
    files["README.md"] = card.encode("utf-8-sig")  # as some editors do
    repository.branches["main"] = repository.add(files, "edited")
    publish(run_folder, REPO, write_results(run_folder, tmp_path / "results.json"))
    merged = repository.at("main")[1]["README.md"].decode()
    metadata = yaml.safe_load(merged.split("---")[1])
    assert (metadata["license"], metadata["language"]) == ("mit", "de") and "mine" in metadata["tags"]
    assert "## Thanks\n\nTo everyone.\n\n## Limits\n\nOnly emoji." in merged
    assert "| Emoji | acc1 | exact (transductive) | 50.00" in merged and merged.count("## Results") == 1
    before = len(repository.commits)
    publish(run_folder, REPO, tmp_path / "results.json")
    assert len(repository.commits) == before


def test_private_branches_and_pull_requests(hub, run_folder):
    publish(run_folder, REPO, private=True, revision="draft")
    repository = hub.repositories[REPO]
    assert repository.private and not repository.at("main")[1] and "config.json" in repository.at("draft")[1]
    assert publish(run_folder, REPO, create_pr=True).endswith("/discussions/1")
    assert not repository.at("main")[1] and "config.json" in repository.at("refs/pr/1")[1]


@pytest.mark.parametrize(
    "token, repo, change, message",
    [
        ("hf_wrong", REPO, {}, "the token is missing or wrong"),
        ("hf_good", "stranger/tiny", {}, "may not write to stranger/tiny"),
        ("hf_good", REPO, {"HF_HUB_OFFLINE": True}, "unset it"),
        ("hf_good", REPO, {"ENDPOINT": "http://127.0.0.1:9"}, "could not be reached"),
        ("hf_good", "tiny", {}, "must be USER/NAME or ORGANIZATION/NAME: its namespace is missing"),
        ("hf_good", "user/ti ny", {}, "must be USER/NAME or ORGANIZATION/NAME: Repo id must use"),
        ("hf_good", "a/b/c", {}, "must be USER/NAME or ORGANIZATION/NAME: Repo id must be in the form"),
    ],
)
def test_refusal_is_explained_and_leaves_nothing(hub, run_folder, monkeypatch, token, repo, change, message):
    monkeypatch.setenv("HF_TOKEN", token)
    for name, value in change.items():
        monkeypatch.setattr(constants, name, value)
    with pytest.raises(UserError, match=message):
        publish(run_folder, repo)
    assert not hub.repositories


def test_server_that_dies_leaves_nothing_half_published(hub, run_folder, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits longer and longer between attempts
    hub.uploads_until_death = 0
    with pytest.raises(UserError, match="run the command again"):
        publish(run_folder, REPO)
    assert not hub.repositories[REPO].at("main")[1]
    hub.uploads_until_death = None
    publish(run_folder, REPO)
    assert "model.safetensors" in hub.repositories[REPO].at("main")[1]


def test_results_of_another_model_are_refused(hub, run_folder, tmp_path):
    results = write_results(save_model(tmp_path / "other", seed=1), tmp_path / "results.json")
    with pytest.raises(UserError, match="are results of other weights"):
        publish(run_folder, REPO, results)
    results = write_results(run_folder, tmp_path / "results.json", config="of another activation")
    with pytest.raises(UserError, match="of another config.json"):
        publish(run_folder, REPO, results)
    assert not hub.repositories


def test_private_model_is_not_sent_to_a_public_repository(hub, run_folder):
    hub.repositories[REPO] = Repository(private=False)
    with pytest.raises(UserError, match="user/tiny exists and is public"):
        publish(run_folder, REPO, private=True)
    assert not hub.repositories[REPO].at("main")[1]
    hub.repositories[REPO].private = True
    publish(run_folder, REPO, private=True)
    assert "model.safetensors" in hub.repositories[REPO].at("main")[1]


def test_sharded_weights_are_published_with_their_index(hub, run_folder):
    model, _ = load_model(str(run_folder))
    (run_folder / "model.safetensors").unlink()
    model.save_pretrained(run_folder, max_shard_size="20KB")
    (run_folder / "model-00001-of-00099.safetensors").write_bytes(b"of an earlier save")
    publish(run_folder, REPO)
    files = hub.repositories[REPO].at("main")[1]
    weights = {name for name in files if ".safetensors" in name}
    index = json.loads(files["model.safetensors.index.json"])
    assert weights == {*index["weight_map"].values(), "model.safetensors.index.json"}
    assert f"has {model.num_parameters() / 1e6:.1f} million parameters" in files["README.md"].decode()
    next(run_folder.glob("model-00002-of-*.safetensors")).unlink()
    with pytest.raises(UserError, match="holds no model"):
        publish(run_folder, REPO)


def test_weights_that_others_cannot_load_are_refused(hub, run_folder):
    weights = load_file(run_folder / "model.safetensors")
    save_file({name: w for name, w in weights.items() if "text" not in name}, run_folder / "model.safetensors")
    with pytest.raises(UserError, match="holds no dual encoder: model.safetensors lacks text_model"):
        publish(run_folder, REPO)
    (run_folder / "model.safetensors").unlink()
    torch.save(weights, run_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin is a pickle"):
        publish(run_folder, REPO)
    assert not hub.repositories


def test_log_whose_last_line_is_cut_off_is_published_without_it(hub, run_folder):
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": null}\n{"step": 3, "lo')
    publish(run_folder, REPO)
    files = hub.repositories[REPO].at("main")[1]
    assert [json.loads(line)["step"] for line in files["metrics.jsonl"].splitlines()] == [1, 2]
    (run_folder / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged .*; mend or remove it"):
        publish(run_folder, REPO)


def test_folder_of_another_architecture_is_refused(hub, tmp_path):
    from transformers import ViTConfig, ViTModel

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**small, image_size=32, patch_size=16)).save_pretrained(tmp_path / "vit")
    for folder, message in ((tmp_path / "vit", "holds a model of type vit"), (tmp_path, "holds no model")):
        with pytest.raises(UserError, match=message):
            publish(folder, REPO)


def test_card_without_a_hub(run_folder, tmp_path, monkeypatch, capsys):
    (run_folder / "eval.jsonl").unlink()
    card = tmp_path / "card.md"
    command = [run_folder, "--repo_id", REPO, "--card_only", card]
    assert run_main(monkeypatch, eval.publish, *command) == 0
    assert "has not been evaluated" in card.read_text()
    blocked = [run_folder, "--repo_id", REPO, "--card_only", card / "below.md"]
    assert run_main(monkeypatch, eval.publish, *blocked) == 1
    assert "--card_only" in capsys.readouterr().err
    assert run_main(monkeypatch, eval.publish, *command, "--results", card) == 1
    assert "is not what eval/run.py writes" in capsys.readouterr().err
