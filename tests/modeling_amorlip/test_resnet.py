"""CLIP's ResNet as a vision encoder. Its output against OpenCLIP's is in test_open_clip_amorlip.py."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from modeling_amorlip import AmorLIPConfig, AmorLIPModel, AmorLIPResNetConfig, AmorLIPResNetModel
from tests.helpers.checkout import TINY, pretrain, run


SMALL = {"width": 4, "depths": [2, 1, 1, 1], "num_attention_heads": 4, "image_size": 64, "output_dim": 32}
VISION = {"model_type": "amorlip_resnet", **SMALL}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return AmorLIPResNetModel(AmorLIPResNetConfig(**SMALL))


def test_defaults_are_rn50():
    with torch.device("meta"):
        model = AmorLIPResNetModel(AmorLIPResNetConfig())
        assert sum(parameter.numel() for parameter in model.parameters()) == 38_316_896
        outputs = model(torch.zeros(2, 3, 224, 224))
    assert outputs.pooler_output.shape == (2, 1024) and outputs.last_hidden_state.shape == (2, 2048, 7, 7)


def test_outputs(model):
    outputs = model.eval()(torch.randn(2, 3, 64, 64), output_hidden_states=True)
    assert outputs.pooler_output.shape == (2, 32)
    channels, sizes = zip(*((state.shape[1], state.shape[-1]) for state in outputs.hidden_states), strict=True)
    assert channels == (4, 16, 16, 32, 64, 128) and sizes == (16, 16, 16, 8, 4, 2)
    assert outputs.last_hidden_state is outputs.hidden_states[-1]
    assert len(model(torch.randn(2, 3, 64, 64), return_dict=False)) == 2


def test_attention_pool_is_multi_head_attention(model):
    """Against PyTorch's module in float64, whose one query is the mean token."""
    pool = copy.deepcopy(model.attnpool).double()
    attention = nn.MultiheadAttention(128, 4, batch_first=True).double()
    attention.in_proj_weight.data = torch.cat([pool.q_proj.weight, pool.k_proj.weight, pool.v_proj.weight])
    attention.in_proj_bias.data = torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias])
    nn.init.eye_(attention.out_proj.weight)
    nn.init.zeros_(attention.out_proj.bias)
    grid = torch.randn(3, 128, 2, 2, dtype=torch.float64)
    tokens = grid.permute(0, 2, 3, 1).reshape(3, 4, 128)
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + pool.positional_embedding
    expected = pool.c_proj(attention(tokens, tokens, tokens)[0][:, 0])
    torch.testing.assert_close(pool(grid), expected)


def test_initialisation(model):
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight") and name.startswith("layer"):
            assert not parameter.any()  # blocks begin as the identity
        elif name.startswith("attnpool") and name.endswith(("proj.weight", "embedding")):
            assert parameter.std().item() == pytest.approx(128**-0.5, rel=0.1)
        else:
            assert parameter.isfinite().all() and parameter.any() or name.endswith("bias")


def test_gradient_checkpointing_changes_neither_gradients_nor_statistics(model):
    nn.init.ones_(model.layer1[1].bn3.weight)
    pixels = torch.randn(4, 3, 64, 64)
    results = []
    for checkpointing in (False, True):
        copied = copy.deepcopy(model).train()
        if checkpointing:
            copied.gradient_checkpointing_enable()
        loss = copied(pixels).pooler_output.square().sum()
        loss.backward(retain_graph=True)
        loss.backward()  # the blocks are computed a third time
        gradients = {name: parameter.grad for name, parameter in copied.named_parameters()}
        statistics = {name: buffer for name, buffer in copied.named_buffers() if "running" in name}
        results.append((gradients, statistics))
    assert results[0][1]["layer1.0.bn1.running_mean"].any()
    for one, other in zip(*results, strict=True):
        assert one.keys() == other.keys() and len(one) > 20
        for name, value in one.items():
            torch.testing.assert_close(other[name], value)


def test_wrong_sizes_are_named(model):
    with pytest.raises(ValueError, match="48 x 64.*64 x 64"):
        model(torch.zeros(1, 3, 48, 64))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": 5}, "width is 5"),
        ({"depths": [3, 4, 6]}, "depths is .3, 4, 6."),
        ({"num_attention_heads": 3}, "num_attention_heads is 3.*128"),
        ({"image_size": 16}, "image_size is 16"),
        ({"image_size": 63}, "image_size is 63"),
    ],
)
def test_wrong_configurations_are_named(changes, message):
    with pytest.raises(Exception, match=message):
        AmorLIPResNetConfig(**SMALL | changes)


def test_projection_is_the_pools_own():
    text = TINY["text_config"]
    model = AmorLIPModel(AmorLIPConfig(vision_config=VISION, text_config=text, projection_dim=32))
    assert isinstance(model.visual_projection, nn.Identity) and isinstance(model.text_projection, nn.Linear)
    assert (model.config.vision_projection, model.config.text_projection) == (False, True)
    # Another size needs a layer to get there; so it can be told to go without, where the sizes agree.
    model = AmorLIPModel(AmorLIPConfig(vision_config=VISION, text_config=text, projection_dim=16))
    assert model.visual_projection.weight.shape == (16, 32)
    with pytest.raises(ValueError, match="vision_projection is False.*32 numbers.*projection_dim is 16"):
        AmorLIPModel(AmorLIPConfig(vision_config=VISION, projection_dim=16, vision_projection=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_through_the_auto_classes(model, tmp_path, dtype):
    model.save_pretrained(tmp_path / "tower")
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "tower"), AmorLIPResNetConfig)
    loaded = AutoModel.from_pretrained(tmp_path / "tower", dtype=dtype)
    assert isinstance(loaded, AmorLIPResNetModel)
    pixels = torch.randn(2, 3, 64, 64)
    expected, got = (m.eval()(pixels.to(m.dtype)).pooler_output.float() for m in (model, loaded))
    torch.testing.assert_close(got, expected, rtol=0, atol=0 if dtype == torch.float32 else 0.03)


@pytest.mark.e2e
def test_trains_with_gradient_checkpointing(recipe, tmp_path):
    vision = {**VISION, "image_size": 48}  # a grid of 1
    result = pretrain(recipe(vision_config=vision, num_train_epochs=1, gradient_checkpointing=True))
    assert result.returncode == 0, result.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").open()]
    assert len(losses) == 6 and all(abs(loss) < 100 for loss in losses)
    loaded = AutoModel.from_pretrained(tmp_path / "run")
    assert loaded.vision_model.config.image_size == 48 and loaded.vision_model.bn1.running_mean.any()
    assert loaded.vision_model.layer1[0].bn3.weight.any()  # it has left the identity


@pytest.mark.e2e
def test_trains_in_the_emoji_demos_recipe(tmp_path):
    tower = {"model_type": "amorlip_resnet", "width": 8, "depths": [1, 1, 1, 1], "num_attention_heads": 4}
    tower |= {"image_size": 48, "output_dim": 128}
    result = run(
        "training/pretrain.py",
        "--config",
        "training/recipes/emoji_demo.yaml",
        "--output_dir",
        tmp_path / "run",
        "--vision_config",
        json.dumps(tower),
        "--max_steps",
        "4",
        "--warmup_steps",
        "1",
        "--log_every",
        "1",
    )
    assert result.returncode == 0, result.stderr
    loaded = AutoModel.from_pretrained(tmp_path / "run")
    assert isinstance(loaded.vision_model, AmorLIPResNetModel) and isinstance(loaded.visual_projection, nn.Identity)
    results = json.loads((tmp_path / "run/eval.jsonl").read_text())["results"]
    assert {"acc1", "acc5"} <= set(results[0]["scores"]["cosine"])
