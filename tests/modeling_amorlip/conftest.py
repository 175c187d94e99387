"""Models as OpenCLIP writes them, for the tests of both conversions."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file


DATA = Path(__file__).parent / "data"


@pytest.fixture(params=["vit", "resnet"])
def stored_open_clip(request, tmp_path):
    """Return (folder as OpenCLIP writes it, state dict, config, inputs and features) of a small model."""
    path = DATA / f"open_clip_{request.param}.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["open_clip_config"])
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    folder = tmp_path / "open_clip"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder, weights, config, tensors
