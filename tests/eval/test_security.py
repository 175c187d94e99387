"""Untrusted input: tars whose names lead out of their folder, models and data that bring code."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

from eval.data import TaskData, read_tar
from eval.tasks import Task
from modeling_amorlip import AmorLIPModel
from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.checkout import DEMO, ROOT, run


TOWERS = ({"image_size": 32, "patch_size": 16, "num_hidden_layers": 1}, {"vocab_size": 50, "num_hidden_layers": 1})
PICTURE = (ROOT / "docs/images/curves.png").read_bytes()


def tree(folder) -> dict[str, bytes | None]:
    """Everything below a folder, with its content."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def hostile_tar(tmp_path):
    """Pairs under names that lead out of the folder or to its root, and links to a secret that lies there."""
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    path = tmp_path / "data/test/0.tar"
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as tar:
        for name in ("../../evil", str(tmp_path / "absolute"), "good", "a/../../../evil"):
            for extension, content in (("png", PICTURE), ("txt", name.encode()), ("cls", b"0")):
                member = tarfile.TarInfo(f"{name}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            for extension in ("png", "txt"):
                member = tarfile.TarInfo(f"link.{extension}")
                member.type, member.linkname = kind, str(secret)
                tar.addfile(member)
    return path


def test_tars_are_read_and_never_extracted(hostile_tar, tmp_path, monkeypatch):
    monkeypatch.chdir(hostile_tar.parent)
    before = tree(tmp_path)
    samples = {key: members for _, key, members in read_tar(hostile_tar)}
    assert len(samples) == 4 and not [key for key in samples if "link" in key]
    assert all(members["png"] == PICTURE for members in samples.values())
    data = TaskData(Task("name", data="data"), str(tmp_path), shards=[hostile_tar])
    assert [sample.captions[0] for sample in data.samples()][2] == "good"
    assert b"secret" not in b"".join(content for members in samples.values() for content in members.values())
    assert tree(tmp_path) == before


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return Path.touch, (Path(self.target),)


def test_arrays_with_code_are_refused(tmp_path):
    content = io.BytesIO()
    np.save(content, np.array([Bomb(tmp_path / "ran")], dtype=object), allow_pickle=True)
    np.load(io.BytesIO(content.getvalue()), allow_pickle=True)
    assert (tmp_path / "ran").exists()  # it would work
    (tmp_path / "ran").unlink()
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in (("0.png", PICTURE), ("0.cls", b"0"), ("0.npy", content.getvalue())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    task = TaskData(Task("name", data="data"), str(tmp_path), shards=[tmp_path / "0.tar"])
    with pytest.raises(UserError, match="allow_pickle=False"):
        list(task.samples())
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def model_with_code(tmp_path):
    """A folder of a model type that nobody knows, whose code leaves a file when it is imported."""
    folder = tmp_path / "model"
    folder.mkdir()
    auto_map = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoProcessor": "evil.Processor"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    return folder


@pytest.mark.e2e
def test_a_models_code_is_not_run(model_with_code, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"train_data": str(DEMO / "train.parquet"), "max_steps": 1}))
    for command in (
        ["eval/run.py", "--tasks", "emoji_openmoji", "--output", tmp_path / "results.json"],
        ["-m", "modeling_amorlip.export_amorlip", "--output", tmp_path / "out"],
        ["training/pretrain.py", "--config", recipe, "--output_dir", tmp_path / "run"],
    ):
        result = run(*command, "--model", model_with_code, launch=1)
        assert result.returncode != 0 and "contains custom code" in result.stderr, result.stderr
    with pytest.raises((ValueError, OSError)):
        AmorLIPModel.from_encoders(model_with_code, model_with_code)
    assert not (tmp_path / "ran").exists()


def test_a_folders_own_copy_of_our_code_is_not_run(tmp_path):
    """Where the package is installed, it is the one that loads a model, whatever code the folder brings."""
    model = AmorLIPModel.from_encoders(*TOWERS)
    model.save_pretrained(tmp_path / "model")
    for path in (tmp_path / "model").glob("*.py"):
        path.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    assert type(AutoModel.from_pretrained(tmp_path / "model")) is AmorLIPModel
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_the_place_of_weights_is_refused(tmp_path):
    model = AmorLIPModel.from_encoders(*TOWERS)
    model.config.save_pretrained(tmp_path / "model")
    torch.save({"logit_scale": Bomb(tmp_path / "ran")}, tmp_path / "model/pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="Unsupported global"):
        AutoModel.from_pretrained(tmp_path / "model")
    assert not (tmp_path / "ran").exists()
