"""The streaming loss against float64 brute force, which holds the whole matrix of logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_amorlip.loss_amorlip import (
    amortization_loss,
    amortized_contrastive_loss,
    blend_log_targets,
    cross_log_partitions,
    log_partitions,
    positive_logits,
    sigmoid_contrastive_loss,
)
from tests.helpers.losses import assert_close, brute_force_log_partitions, brute_force_loss, make_batch


def compare(batch, ours, reference, value_rtol=1e-6, gradient_rtol=1e-5):
    doubles = [leaf.detach().double().requires_grad_() for leaf in batch]
    value, expected = ours(*batch), reference(*doubles)
    assert_close(value, expected, value_rtol, "value")
    gradients = torch.autograd.grad(value, batch)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, doubles), strict=True):
        assert_close(gradient, wanted, gradient_rtol, "gradient")


@pytest.mark.parametrize("bias", [None, -3.0])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("n, tile_size", [(1, 1024), (2, 1), (17, 5), (64, 64), (127, 32), (300, 128), (300, 1024)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_equals_brute_force(n, tile_size, scale, bias, dtype):
    batch = make_batch(n, scale=scale, bias=bias, dtype=dtype)
    with torch.no_grad():
        estimates = brute_force_log_partitions(*[leaf.double() for leaf in batch])
    generator = torch.Generator().manual_seed(1)
    # Both sides are given the same numbers, so log lambda is rounded once, as a caller's would be.
    log_lambda = [(z + 0.5 * torch.randn(n, generator=generator)).to(dtype).double() for z in estimates]

    def ours(x, y, s, b=None):
        return amortized_contrastive_loss(x, y, s, *log_lambda, logit_bias=b, tile_size=tile_size)

    compare(batch, ours, lambda x, y, s, b=None: brute_force_loss(x, y, s, b, *log_lambda))


@pytest.mark.parametrize("weight", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("n, tile_size", [(2, 1024), (17, 5), (300, 128)])
def test_log_partitions_equal_brute_force(n, tile_size, weight):
    batch = make_batch(n, scale=50.0, bias=0.7)
    upstream = torch.randn(2, n, generator=torch.Generator().manual_seed(2)).double()

    def ours(x, y, s, b):
        pair = log_partitions(x, y, s, logit_bias=b, positive_weight=weight, tile_size=tile_size)
        return (torch.stack(pair) * upstream).sum()

    compare(batch, ours, lambda *a: (torch.stack(brute_force_log_partitions(*a, c=weight)) * upstream).sum())


@pytest.mark.parametrize("images, texts, tile_size", [(1, 1, None), (3, 70, 16), (130, 40, 32)])
def test_cross_log_partitions_equal_brute_force(images, texts, tile_size):
    """Of a rectangle, without positives; the gradients too."""
    x = make_batch(images, scale=50.0, bias=0.7)[0]
    _, y, s, b = make_batch(texts, scale=50.0, bias=0.7, seed=1)
    upstream = torch.randn(images + texts, generator=torch.Generator().manual_seed(2)).double()

    def ours(x, y, s, b):
        return (torch.cat(cross_log_partitions(x, y, s, logit_bias=b, tile_size=tile_size)) * upstream).sum()

    def reference(x, y, s, b):
        logits = s * x @ y.T + b
        return (torch.cat([logits.logsumexp(1), logits.logsumexp(0)]) * upstream).sum()

    compare([x, y, s, b], ours, reference)


def test_cross_log_partitions_name_wrong_shapes():
    with pytest.raises(ValueError, match=r"\[2, 8\] and \[3, 4\]"):
        cross_log_partitions(torch.zeros(2, 8), torch.zeros(3, 4), 1.0)
    with pytest.raises(ValueError, match="0 images and 3 texts"):
        cross_log_partitions(torch.zeros(0, 4), torch.zeros(3, 4), 1.0)


def test_bf16_inputs_are_accumulated_in_float32():
    batch = make_batch(100, scale=100.0, dtype=torch.bfloat16)
    log_lambda = brute_force_log_partitions(*[leaf.detach().double() for leaf in batch])

    def ours(x, y, s):
        return amortized_contrastive_loss(x, y, s, *log_lambda)

    loss = ours(*batch)
    assert loss.dtype == torch.float32
    # The inputs are rounded, the computation is not; gradients come back in the inputs' dtype.
    compare(batch, ours, lambda x, y, s: brute_force_loss(x, y, s, None, *log_lambda), 1e-5, 4e-3)


def test_infonce_is_the_loss_against_the_batchs_own_partitions():
    batch = make_batch(50)
    x, y, s = batch
    log_z = log_partitions(x, y, s, positive_weight=1.0)
    logits, labels = s * x @ y.T, torch.arange(50)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    infonce = ((log_z[0] + log_z[1]) / 2 - positive_logits(x, y, s)).mean()
    torch.testing.assert_close(infonce, expected)
    amortized = amortized_contrastive_loss(x, y, s, *log_z, positive_weight=1.0)
    for ours, wanted in zip(torch.autograd.grad(amortized, batch), torch.autograd.grad(expected, batch), strict=True):
        torch.testing.assert_close(ours, 2 * wanted)


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_matrix_of_all_pairs_is_held():
    x, y, s = make_batch(2048, d=8, dtype=torch.float32)
    with LargestTensor() as largest:
        log_z = log_partitions(x, y, s, tile_size=256)
        loss = amortized_contrastive_loss(x, y, s, *log_z, tile_size=256)
        loss = loss + sigmoid_contrastive_loss(x, y, s, tile_size=256)
        loss.backward()
    assert largest.elements == 256 * 256


def test_blended_target_and_objectives():
    previous, estimate = torch.tensor([1.0, 90.0]), torch.tensor([2.0, -90.0])
    expected = (0.3 * previous.double().exp() + 0.7 * estimate.double().exp()).log()
    torch.testing.assert_close(blend_log_targets(previous, estimate, 0.3), expected.float())
    assert blend_log_targets(previous, estimate, 0.0) is estimate
    assert amortization_loss(previous, estimate).item() == pytest.approx((1 + 180**2) / 2)
    # The conjugate objective is least, namely log Z, where h = log Z.
    h = torch.tensor([2.0], requires_grad=True)
    value = amortization_loss(h, None, objective="conjugate", log_z_batch=torch.tensor([2.0]))
    assert value.item() == pytest.approx(2.0) and torch.autograd.grad(value, h)[0].item() == pytest.approx(0.0)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(text_embeds=torch.zeros(3, 8)), "shape"),
        (dict(positive_weight=-1.0), "positive_weight"),
        (dict(negatives="all"), "negatives"),
        (dict(tile_size=0), "tile_size"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = dict(image_embeds=torch.zeros(4, 8), text_embeds=torch.zeros(4, 8), logit_scale=1.0) | change
    with pytest.raises(ValueError, match=message):
        log_partitions(**arguments)
    with pytest.raises(ValueError, match="choose one of"):
        amortization_loss(torch.zeros(2), torch.zeros(2), objective="mse")


@pytest.mark.e2e
def test_torch_compile_changes_nothing():
    batch = make_batch(64, dtype=torch.float32)

    def step(x, y, s):
        with torch.no_grad():
            log_z = log_partitions(x, y, s)
        contrast = amortized_contrastive_loss(x, y, s, *log_z) + sigmoid_contrastive_loss(x, y, s)
        return contrast + log_partitions(x, y, s)[0].mean()

    value, compiled = step(*batch), torch.compile(step, backend="aot_eager")(*batch)
    torch.testing.assert_close(compiled, value, rtol=0, atol=0)
    for ours, wanted in zip(torch.autograd.grad(compiled, batch), torch.autograd.grad(value, batch), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0)
