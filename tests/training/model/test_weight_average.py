"""The average of the weights: its values, exact resumption, and that training does not notice it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from tests.helpers.runs import assert_same_weights, build, one_thread, read_metrics, train, train_until_killed
from training.model.weight_average import WeightAverage


RESNET = {
    "model_type": "amorlip_resnet",
    "image_size": 32,
    "depths": [1, 1, 1, 1],
    "width": 8,
    "output_dim": 32,
    "num_attention_heads": 4,
}
RESUME = ("--resume_from_checkpoint", "latest")


def test_average_of_weights_and_running_statistics():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    model[0].bias.requires_grad_(False)
    average = WeightAverage(model, 0.3)
    assert set(average.tensors) == {"0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"}
    expected = {name: tensor.double().clone() for name, tensor in average.tensors.items()}
    for step in range(5):
        model(torch.randn(8, 3)).square().sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(step)
        decay = min(0.3, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if name in expected:
                expected[name] = decay * expected[name] + (1 - decay) * value.double()
    for name, value in expected.items():
        torch.testing.assert_close(average.tensors[name].double(), value, rtol=1e-5, atol=1e-6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), average.swapped():
        for name, value in expected.items():
            torch.testing.assert_close(model.state_dict()[name].double(), value, rtol=1e-5, atol=1e-6)
        raise ZeroDivisionError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.e2e
@pytest.mark.parametrize("changes", [{}, {"vision_config": RESNET, "objective": "clip", "objective_args": {}}])
def test_runs_with_an_average(recipe, tmp_path, changes):
    path = recipe(max_steps=4, checkpoint_every=2, validation_samples=20, eval_every=2, **changes)
    plain, whole, killed = (tmp_path / name for name in ("plain", "whole", "killed"))
    decay = ("--ema_decay", 0.6)
    train(path, "--output_dir", plain)
    trainer = train(path, "--output_dir", whole, *decay)
    assert read_metrics(whole) == read_metrics(plain), "training does not notice the average"
    assert_same_weights(whole, plain)
    train_until_killed(path, 4, "--output_dir", killed, *decay)
    train(path, "--output_dir", killed, *decay, *RESUME)
    assert_same_weights(killed / "ema", whole / "ema")
    raw, averaged = (load_file(folder / "model.safetensors") for folder in (whole, whole / "ema"))
    assert raw.keys() == averaged.keys()
    for name, tensor in trainer.weights.average.tensors.items():
        assert torch.equal(averaged[name], tensor), name
    assert any(not torch.equal(raw[name], averaged[name]) for name in raw)
    assert AutoModel.from_pretrained(whole / "ema").config.to_dict().keys()
    lines, theirs = ([json.loads(x) for x in (f / "eval.jsonl").read_text().splitlines()] for f in (whole, plain))
    assert [line["step"] for line in lines] == [2, 4]
    for line, plain_line in zip(lines, theirs, strict=True):
        assert line["validation_loss"] == plain_line["validation_loss"] != line["ema"]["validation_loss"]


def test_average_that_a_checkpoint_lacks_starts_from_its_weights(recipe, tmp_path):
    path = recipe(max_steps=2, checkpoint_every=2, warmup_steps=0)
    train(path, "--output_dir", tmp_path / "run")
    with one_thread():
        options = ("--ema_decay", 0.9, "--override", "ema_decay", "--max_steps", 3)
        trainer = build(path, "--output_dir", tmp_path / "run", *RESUME, *options)
    for name, parameter in trainer.model.named_parameters():
        assert not parameter.requires_grad or torch.equal(trainer.weights.average.tensors[name], parameter)


def test_an_update_equals_that_of_each_tensor_by_itself():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 5).double())
    average = WeightAverage(model, 0.999)
    assert {tensor.dtype for tensor in average.tensors.values()} == {torch.float32, torch.float64}
    expected = {name: tensor.clone() for name, tensor in average.tensors.items()}
    state = model.state_dict()
    for step in (0, 1, 50, 20_000):
        for name, tensor in expected.items():
            state[name].add_(torch.randn_like(tensor))
            tensor.lerp_(state[name], 1 - min(0.999, (1 + step) / (10 + step)))
        average.update(step)
    assert all(torch.equal(average.tensors[name], tensor) for name, tensor in expected.items())
