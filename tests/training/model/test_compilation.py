"""Compiled encoders: no graph break, one program for all lengths, and the losses of training."""

import pytest
import torch
from torch._dynamo.utils import counters

from modeling_amorlip import AmorLIPModel
from tests.helpers.checkout import run
from tests.helpers.runs import read_metrics, train
from tests.helpers.towers import make_config, make_inputs
from training.model.compilation import compile_encoder
from training.model.encoder import PairEncoder


pytestmark = pytest.mark.e2e  # compilation takes long


def encode(encoder, length):
    batch = make_inputs(3)
    pixels = (20 * batch["pixel_values"] + 128).clamp(0, 255).to(torch.uint8)
    output = encoder(pixels, batch["input_ids"][:, :length], batch["attention_mask"][:, :length])
    (output.image_embeds[0] - output.text_embeds[0]).square().sum().backward()
    return output


@pytest.mark.parametrize("towers, by_layer", [("clip", False), ("clip", True)])
def test_no_graph_breaks_and_one_program_for_all_lengths(towers, by_layer):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    encoder = PairEncoder(AmorLIPModel(make_config(towers)), [0.5] * 3, [0.5] * 3)
    expected = encode(encoder, 9)
    names = list(encoder.state_dict())
    compile_encoder(encoder, by_layer, backend="eager")
    assert list(encoder.state_dict()) == names
    output = encode(encoder, 9)
    torch.testing.assert_close(output.text_embeds, expected.text_embeds)
    torch.testing.assert_close(output.image_embeds, expected.image_embeds)
    for length in (8, 7, 6):  # texts of up to 7 tokens have no padding here, so layers get no mask
        encode(encoder, length)
    graphs = counters["stats"]["unique_graphs"]
    for length in (5, 8, 4, 9, 7):
        encode(encoder, length)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == graphs <= (5 if by_layer else 3)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--micro_batch_size", 6, "--text_groups", 2), ("--patch_dropout", 0.5)])
def test_compiled_runs_have_the_same_losses(recipe, tmp_path, options):
    path = recipe(max_steps=5, validation_samples=10)
    train(path, "--output_dir", tmp_path / "eager", *options)
    train(path, "--output_dir", tmp_path / "compiled", "--compile", "true", *options)
    for ours, theirs in zip(read_metrics(tmp_path / "compiled"), read_metrics(tmp_path / "eager"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_compiled_and_sharded_runs_go_on(recipe, tmp_path):
    path = recipe(max_steps=4, checkpoint_every=2, per_device_train_batch_size=8)
    result = run("tests/helpers/sharded_runs.py", path, tmp_path, "--compile", "true", launch=2, timeout=1200)
    assert result.returncode == 0, result.stderr
