"""Whatever a model is cast to, whenever: forward, backward, saving and loading, and float32 where it matters."""

import copy
import json

import pytest
import torch
from transformers import AutoModel

from modeling_amorlip import AmorLIPConfig, AmorLIPModel
from modeling_amorlip.configuration_amorlip import HEAD_TYPES
from tests.helpers.towers import TOWERS, make_config, make_inputs


def with_default_dtype(config):
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return AmorLIPModel(config)
    finally:
        torch.set_default_dtype(previous)


CASTS = {
    "half": lambda config: AmorLIPModel(config).half(),
    "bfloat16": lambda config: AmorLIPModel(config).bfloat16(),
    "double": lambda config: AmorLIPModel(config).double(),
    "to": lambda config: AmorLIPModel(config).to(torch.float16),
    "from_config": lambda config: AutoModel.from_config(config, dtype=torch.bfloat16),
    "default dtype": with_default_dtype,
}


MODELS = [(towers, "residual_mlp") for towers in TOWERS] + [("clip", head_type) for head_type in HEAD_TYPES[1:]]
every_model = pytest.mark.parametrize("towers, head_type", MODELS)


@every_model
@pytest.mark.parametrize("cast", CASTS)
def test_forward_and_backward(cast, towers, head_type):
    torch.manual_seed(0)
    model = CASTS[cast](make_config(towers, head_type, layers=1))
    outputs = model(**make_inputs(), return_loss=True)
    for name in ("loss", "logits_per_image", "log_partition_per_image", "log_partition_per_text"):
        assert outputs[name].dtype == torch.float32 and outputs[name].isfinite().all()
    assert outputs.image_embeds.dtype == outputs.text_embeds.dtype == model.dtype
    outputs.loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@every_model
@pytest.mark.parametrize("cast", CASTS)
def test_save_and_load(cast, towers, head_type, tmp_path):
    torch.manual_seed(0)
    model = CASTS[cast](make_config(towers, head_type, layers=1)).eval()
    model.save_pretrained(tmp_path)
    for options in ({}, {"dtype": torch.bfloat16}):
        loaded = AutoModel.from_pretrained(tmp_path, **options)
        assert loaded.dtype == options.get("dtype", model.dtype)
        heads = [*loaded.amortizer.parameters(), *loaded.amortizer.buffers()]
        assert all(tensor.dtype.itemsize >= 4 for tensor in (loaded.logit_scale, *heads))
        assert_same_outputs(loaded, model, 1e-6 if not options else 0.05)
        assert_same_outputs(loaded.half(), model, 0.05)


def assert_same_outputs(loaded, model, tolerance):
    actual, expected = loaded(**make_inputs()), model(**make_inputs())
    torch.testing.assert_close(actual.image_embeds.double(), expected.image_embeds.double(), rtol=0, atol=tolerance)
    torch.testing.assert_close(
        actual.log_partition_per_image, expected.log_partition_per_image, rtol=0, atol=10 * tolerance + 1e-3
    )


def test_heads_keep_float32_precision_beside_half_encoders():
    """A head in float32 is not rounded to what the encoders compute in."""
    torch.manual_seed(0)
    model = AmorLIPModel(make_config("clip", "prototype")).eval()
    expected = model(**make_inputs()).image_embeds
    exact, _ = model.amortizer(expected, None, 100.0)
    half, _ = model.amortizer(expected.half(), None, 100.0)
    torch.testing.assert_close(half, exact, rtol=0, atol=0.1)
    double, _ = model.double().amortizer(expected.double(), None, 100.0)
    assert double.dtype == torch.float32
    torch.testing.assert_close(double, exact)


@pytest.mark.parametrize("towers", TOWERS)
def test_logits_are_float32_under_autocast(towers):
    model = AmorLIPModel(make_config(towers, layers=1, logit_scale_init_value=4.605)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**make_inputs(), return_loss=True)
    assert outputs.logits_per_image.dtype == outputs.loss.dtype == torch.float32
    expected = model.logit_scale.exp() * outputs.image_embeds.float() @ outputs.text_embeds.float().T
    torch.testing.assert_close(outputs.logits_per_image, expected)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", torch.bfloat16])
def test_encoders_have_the_dtype_of_the_whole_model(name, value, tmp_path):
    """What a configuration of an encoder remembers of a checkpoint's dtype does not count, nor in a saved folder."""
    config = make_config("clip", layers=1).to_dict()
    config["vision_config"][name] = config["text_config"][name] = value
    for build in (AmorLIPModel, AutoModel.from_config):
        model = build(AmorLIPConfig(**copy.deepcopy(config)))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["vision_config"][name] = "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert {p.dtype for p in AutoModel.from_pretrained(tmp_path).parameters()} == {torch.float32}
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.vision_model.dtype == model.text_model.dtype == torch.bfloat16
