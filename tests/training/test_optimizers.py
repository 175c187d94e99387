"""Optimizers by name, their options, layer-wise learning rates, and skipped steps of each."""

import sys
import types

import pytest
import torch
from accelerate import Accelerator

from modeling_amorlip import AmorLIPModel
from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.runs import assert_same_weights, read_metrics, train, train_until_killed
from tests.helpers.towers import TOWERS, make_config
from training.config import PretrainConfig
from training.optimization import step_if_finite
from training.optimizers import TORCH_OPTIMIZERS, layer_scales, make_optimizer


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(7, 5)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))


def config(**changes):
    return PretrainConfig(output_dir="x", train_data="x", **changes)


@pytest.mark.parametrize("name", TORCH_OPTIMIZERS)
def test_steps_of_every_optimizer_lower_a_loss_and_skip_nan(name):
    model, accelerator = Tiny(), Accelerator(cpu=True)
    optimizer = accelerator.prepare_optimizer(make_optimizer(model, config(optimizer=name, learning_rate=1e-2)))
    losses = []
    for step in range(6):
        loss = (model.layer(torch.ones(3, 7)) - 1).square().mean() + 0 * model.logit_scale
        loss.backward()
        if step in (0, 3):
            before = [parameter.clone() for parameter in model.parameters()]
            model.layer.weight.grad[0, 0] = float("nan")
            assert step_if_finite(accelerator, optimizer, torch.tensor(float("nan"))).item() == 1
            assert all(map(torch.equal, model.parameters(), before)), "a skipped step changes nothing"
            continue
        assert step_if_finite(accelerator, optimizer, torch.tensor(1.0)).item() == 0
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"optimizer": "adamv"}, "Unknown optimizer adamv: did you mean adam"),
        ({"optimizer": "lbfgs"}, "Unknown optimizer lbfgs"),
        ({"optimizer": "sgd", "optimizer_args": {"momentun": 0.9}}, "did you mean optimizer_args.momentum"),
        ({"optimizer": "sgd", "optimizer_args": {"momentum": -1}}, "optimizer sgd: Invalid momentum value: -1"),
        ({"optimizer": "sgd", "optimizer_args": {"lr": 1}}, "optimizer_args.lr: set it with --learning_rate"),
        ({"optimizer_args": {"betas": [0, 1]}}, "optimizer_args.betas: set it with --adam_beta1"),
        ({"optimizer": "sgd", "adam_beta2": 0.9}, "adam_beta2 has no effect on sgd"),
    ],
)
def test_wrong_names_and_options_are_refused(settings, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=message):
        make_optimizer(Tiny(), config(**settings))


def test_optimizers_of_timm(monkeypatch):
    """Against a stand-in with timm's functions: timm is not among the project's requirements."""
    timm, optim = types.ModuleType("timm"), types.ModuleType("timm.optim")
    timm.optim = optim
    optim.list_optimizers = lambda: ["lion", "adahessian", "adamw"]
    optim.get_optimizer_info = lambda name: types.SimpleNamespace(second_order=name == "adahessian")

    class Lion(torch.optim.SGD):
        def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
            super().__init__(params, lr=lr, weight_decay=weight_decay)

    optim.get_optimizer_class = {"lion": Lion}.__getitem__
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "timm.optim", optim)
    optimizer = make_optimizer(
        Tiny(), config(optimizer="Lion", optimizer_args={"betas": [0.9, 0.95]}, weight_decay=0.3)
    )
    assert isinstance(optimizer, Lion) and optimizer.param_groups[0]["weight_decay"] == 0.3
    assert isinstance(make_optimizer(Tiny(), config()), torch.optim.AdamW)
    for name, message in (("lyon", "did you mean lion"), ("adahessian", "second derivatives")):
        with pytest.raises(UserError, match=message):
            make_optimizer(Tiny(), config(optimizer=name))


@pytest.mark.parametrize("towers", TOWERS)
def test_learning_rates_fall_towards_the_input(towers):
    model = AmorLIPModel(make_config(towers))
    scales = layer_scales(model, 0.5)
    for side in ("vision_model", "text_model"):
        values = {name: scale for name, scale in scales.items() if name.startswith(side)}
        assert set(values) == {f"{side}.{name}" for name, _ in model.get_submodule(side).named_parameters()}
        order = [scale for name, scale in values.items() if scale < 1]
        assert order == sorted(order) and 0.5 in order, "layers are listed from the input on"
        first = next(iter(values.values()))
        assert first == min(values.values()) == 0.5 ** len({*order}), "embeddings have the lowest rate"
    groups = make_optimizer(
        model, config(layer_decay=0.5, learning_rate=1.0, logit_scale_learning_rate=0.3)
    ).param_groups
    rates = {id(p): group["peak_lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == (0.3 if name == "logit_scale" else scales.get(name, 1.0)), name


@pytest.mark.parametrize("changes", [{"optimizer": "sgd", "optimizer_args": {"momentum": 0.9}}, {"layer_decay": 0.7}])
def test_other_optimizers_resume_exactly(recipe, tmp_path, changes):
    path = recipe(max_steps=4, checkpoint_every=2, **changes)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(path, "--output_dir", whole)
    train_until_killed(path, 4, "--output_dir", killed)
    train(path, "--output_dir", killed, "--resume_from_checkpoint", "latest")
    assert read_metrics(killed) == read_metrics(whole)
    assert_same_weights(killed, whole)
