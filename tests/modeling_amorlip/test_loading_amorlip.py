"""Checkpoints without all weights are refused by every command, and none of them overwrites the model it reads."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval.models
from eval.scoring import require_amortizer
from modeling_amorlip import convert_amorlip_to_clip, convert_clip_to_amorlip, export_amorlip
from modeling_amorlip.cli_amorlip import UserError
from modeling_amorlip.convert_clip_to_amorlip import convert
from modeling_amorlip.loading_amorlip import load_amorlip, load_complete
from tests.helpers.dual_encoders import make_clip
from tests.helpers.models import make_model, save_model
from tests.helpers.tasks import run_main


def drop(folder, part):
    """Take weights out of a folder, as a download that was mended by hand."""
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if part not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("part", ["visual_projection", "text_model", "logit_scale"])
def test_checkpoint_that_lacks_weights_is_refused(part, tmp_path):
    folder = drop(save_model(tmp_path / "ours"), part)
    with pytest.raises(UserError, match=f"--source .* cannot be loaded: its checkpoint lacks .*{part}"):
        load_amorlip("--source", folder)
    with pytest.raises(UserError, match=f"--model .* cannot be loaded: its checkpoint lacks .*{part}"):
        eval.models.load_model(str(folder))
    make_clip().save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=f"clip cannot be loaded: its checkpoint lacks .*{part}"):
        convert(drop(tmp_path / "clip", part))


def test_heads_that_were_never_trained_do_not_score(tmp_path):
    model, _ = eval.models.load_model(str(save_model(tmp_path / "a")))
    require_amortizer(model, ("amortized",))
    model, _ = eval.models.load_model(str(drop(tmp_path / "a", "amortizer.")))
    require_amortizer(model, ("cosine", "exact"))
    with pytest.raises(UserError, match="needs trained heads, .*calibrate.py"):
        require_amortizer(model, ("amortized",))


@pytest.mark.parametrize("content", [b"", b"damaged"])
def test_damaged_weights_are_refused(content, tmp_path):
    make_clip().save_pretrained(tmp_path / "clip")
    folder = save_model(tmp_path / "ours")
    for file in (folder / "model.safetensors", tmp_path / "clip/model.safetensors"):
        file.write_bytes(content)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_amorlip("--source", folder)
    with pytest.raises(ValueError, match="cannot be loaded"):
        convert(tmp_path / "clip")
    for text in ("{", "[]"):
        (tmp_path / "clip/config.json").write_text(text)
        with pytest.raises(ValueError, match="clip/config.json (is damaged|holds a list)"):
            convert(tmp_path / "clip")


@pytest.mark.parametrize("module", [convert_amorlip_to_clip, convert_clip_to_amorlip, export_amorlip])
def test_no_command_overwrites_the_model_that_it_reads(module, tmp_path, monkeypatch, capsys):
    folder = save_model(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    source = "--model" if module is export_amorlip else "--source"
    for output, message in (
        (f"{folder}/.", "is the folder of the model itself, which would be overwritten"),
        (folder / "config.json", "cannot be written"),
        (folder / "config.json/below", "cannot be written"),
    ):
        assert run_main(monkeypatch, module, source, folder, "--output", output) == 1
        assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_complete_models_are_loaded_as_they_are(tmp_path):
    folder = save_model(tmp_path / "a")
    model, expected = load_complete(folder, dtype=torch.float32), make_model()[0]
    assert not model.has_fresh_heads
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
