"""Parameter groups, schedule, the logit scale's bounds, skipped steps, and norms without a copy of the model."""

import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState

from training.config import PretrainConfig
from training.optimization import (
    clip_gradients,
    constrain_logit_scale_,
    set_learning_rates,
    step_if_finite,
    update_norms,
)
from training.optimizers import make_optimizer


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.vision_model = torch.nn.Linear(7, 5)
        self.text_model = torch.nn.LayerNorm(6)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))


def config(**changes):
    return PretrainConfig(output_dir="x", train_data="x", **changes)


def test_weight_decay_applies_to_matrices_only():
    model = Tiny()
    matrices, vectors, scale = make_optimizer(model, config(weight_decay=0.3)).param_groups
    assert matrices["weight_decay"] == 0.3 and matrices["params"] == [model.vision_model.weight]
    assert vectors["weight_decay"] == scale["weight_decay"] == 0 and len(vectors["params"]) == 3
    assert scale["params"] == [model.logit_scale] and scale["lr"] == 1e-4


@pytest.mark.parametrize(
    "schedule, factors",
    [
        ("cosine", {0: 0.25, 3: 1.0, 4: 1.0, 8: 0.5, 12: 0.0}),
        ("constant", {0: 0.25, 3: 1.0, 4: 1.0, 8: 1.0, 12: 1.0}),
        ("wsd", {0: 0.25, 3: 1.0, 4: 1.0, 9: 1.0, 10: 2 / 3, 11: 1 / 3, 12: 0.0}),
    ],
)
def test_schedules(schedule, factors):
    settings = config(learning_rate=0.8, warmup_steps=4, lr_scheduler_type=schedule, decay_steps=3)
    optimizer = make_optimizer(Tiny(), settings)
    for step, factor in factors.items():
        assert set_learning_rates(optimizer, step, 12, settings) == pytest.approx(0.8 * factor, abs=1e-12)
        assert optimizer.param_groups[2]["lr"] == pytest.approx(1e-4 * factor, abs=1e-12)


@pytest.mark.parametrize(
    "previous, updated, expected",
    [
        (30.0, 33.0, 33.0),
        (40.0, 44.0, 40 * 1.1 ** (1 / 3)),
        (98.0, 101.0, 98 * (101 / 98) ** (1 / 3)),
        (30.0, 150.0, 100.0),
    ],
)
def test_logit_scale_is_slowed_and_bounded(previous, updated, expected):
    parameter = torch.tensor(math.log(updated))
    constrain_logit_scale_(parameter, torch.tensor(math.log(previous)), 33.3, 100.0)
    assert parameter.exp().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_update_norms_are_those_of_the_step(weight_decay):
    """Over several steps, of which the first and a later one are skipped."""
    model, accelerator = Tiny(), Accelerator(cpu=True)
    optimizer = accelerator.prepare_optimizer(make_optimizer(model, config(weight_decay=weight_decay)))
    for step in range(6):
        before = {name: p.detach().double() for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        skipped = step_if_finite(accelerator, optimizer, torch.tensor(float("nan") if step in (0, 3) else 1.0))
        assert skipped.item() == (step in (0, 3)) and model.logit_scale.grad is None
        norms = update_norms(model, optimizer.optimizer, skipped)
        for group in ("vision", "text", "logit_scale"):
            changes = [p.double() - before[name] for name, p in model.named_parameters() if name.startswith(group)]
            expected = math.sqrt(sum(change.square().sum().item() for change in changes))
            norm = norms[f"update/{'other' if group == 'logit_scale' else group}"].item()
            assert norm == pytest.approx(expected, rel=2e-3) and (norm == 0) == (step in (0, 3))


@pytest.mark.parametrize("registered", [True, False], ids=["whole", "sharded"])
def test_loss_scaler_gives_the_same_steps(registered):
    """As with fp16 on a GPU. The optimizer of a sharded model is not registered with Accelerate."""
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        AcceleratorState._reset_state(True)
        model, accelerator = Tiny(), Accelerator(cpu=True)
        if scaler is not None:
            accelerator.scaler, accelerator.native_amp, accelerator.state._mixed_precision = scaler, True, "fp16"
        inner = make_optimizer(model, config(max_grad_norm=0.1))
        if registered:
            optimizer = accelerator.prepare_optimizer(inner)
        else:
            optimizer = AcceleratedOptimizer(inner, device_placement=False, scaler=scaler)
        for step in range(4):
            inputs = torch.full((2, 7), float("inf") if step == 2 else 1.0 + step)
            loss = model.vision_model(inputs).square().mean() + model.text_model.weight.sum() * model.logit_scale
            accelerator.backward(loss)
            norm = clip_gradients(accelerator, optimizer, list(model.parameters()), 0.1)
            assert norm.isfinite() == (step != 2)
            assert step_if_finite(accelerator, optimizer, norm).item() == (step == 2)
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    AcceleratorState._reset_state(True)
    assert scaler.get_scale() == 512.0
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
