"""Triton kernels against float64 brute force: on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch

from modeling_amorlip import kernels_amorlip as kernels
from modeling_amorlip.loss_amorlip import amortized_contrastive_loss, log_partitions
from modeling_amorlip.tiles_amorlip import exponential_pass
from tests.helpers.checkout import ROOT
from tests.helpers.losses import assert_close, brute_force_log_partitions, brute_force_loss, make_batch


pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HAS_KERNELS = kernels.kernels_run_on(DEVICE)
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="run in a process with the interpreter, see below")
DTYPES = (torch.float16, torch.bfloat16)


@pytest.mark.skipif(HAS_KERNELS, reason="the kernels run in this process")
@pytest.mark.e2e
def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "not compile and not interpreter"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "passed" in result.stdout and "skipped" not in result.stdout, result.stdout


def rectangle(dtype, n=100, number=300, d=80):
    """Unit-norm rows and columns, on the device, and a scale."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(k, d, generator=generator), dim=-1) for k in (n, number))
    return x.to(DEVICE, dtype), y.to(DEVICE, dtype), torch.tensor(30.0, device=DEVICE)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, number, d, offset", [(1, 1, 16, 0), (100, 300, 80, 130), (300, 140, 64, 0)])
def test_log_sum_exps(n, number, d, offset, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "PANEL", 128)
    x, y, scale = rectangle(dtype, n, number, d)
    logits = scale.double() * x.double() @ y.double().T
    i = torch.arange(min(n, number - offset), device=DEVICE)
    logits[i, i + offset] += -3.0
    by_row, by_column = kernels.log_sum_exps(x, y, scale, offset, -3.0)
    torch.testing.assert_close(by_row, logits.logsumexp(1).float(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(by_column, logits.logsumexp(0).float(), rtol=1e-6, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile_size", [96, 4096])
def test_exponential_pass(dtype, tile_size):
    x, y, scale = rectangle(dtype)
    offset, bias = 130, torch.tensor(-2.0, device=DEVICE)
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.rand(k, generator=generator).to(DEVICE) for k in (len(x), len(y)))
    a, b = (torch.randn(k, generator=generator).to(DEVICE) for k in (len(x), len(y)))
    ours = exponential_pass(x, y, scale, bias, offset, a, b, u, v, 1e-3, tile_size, pull=2.0)

    leaves = [leaf.double().requires_grad_() for leaf in (bias, scale, x, y)]
    bias, scale, x, y = leaves
    logits = scale * x @ y.T + bias
    weights = torch.ones_like(logits)
    i = torch.arange(len(x), device=DEVICE)
    weights[i, i + offset] = 1e-3
    terms = weights * (u[:, None] * (logits - a[:, None]).exp() + v * (logits - b).exp())
    value = terms.sum() - 2 * logits[i, i + offset].sum()
    # With bfloat16 the weights and their products with embeddings are rounded to it, each to within 2^-8.
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
    for name, got, wanted, rtol in zip(
        ("value", "bias", "scale", "rows", "columns"),
        ours,
        (value, *torch.autograd.grad(value, leaves)),
        (1e-5, 1e-5, tolerance, tolerance, tolerance),
        strict=True,
    ):
        assert_close(got, wanted, rtol, name)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [0.0, 1e-3, 1.0])
def test_loss_and_estimate_from_the_kernels(dtype, weight):
    batch = [leaf.detach().to(DEVICE).requires_grad_() for leaf in make_batch(150, scale=100.0, dtype=dtype)]
    doubles = [leaf.detach().double().requires_grad_() for leaf in batch]
    expected = brute_force_log_partitions(*doubles, c=weight)
    log_z = log_partitions(*batch, positive_weight=weight)
    for ours, wanted in zip(log_z, expected, strict=True):
        assert_close(ours, wanted, 1e-6, "log-partition")
    loss = amortized_contrastive_loss(*batch, *log_z, positive_weight=weight)
    wanted = brute_force_loss(*doubles, None, *(z.detach() for z in log_z), c=weight)
    assert_close(loss, wanted, 1e-5, "loss")
    for ours, gradient in zip(torch.autograd.grad(loss, batch), torch.autograd.grad(wanted, doubles), strict=True):
        assert ours.isfinite().all()
        assert_close(ours, gradient, 6e-3, "gradient")


@needs_kernels
@pytest.mark.parametrize("kind", ["identical", "orthogonal", "one pair"])
def test_extremes_stay_finite(kind):
    x = {
        "identical": torch.nn.functional.normalize(torch.ones(130, 16), dim=-1),
        "orthogonal": torch.eye(130),
        "one pair": torch.nn.functional.normalize(torch.ones(1, 16), dim=-1),
    }[kind].to(DEVICE, torch.float16)
    batch = [x.clone().requires_grad_(), x.clone().requires_grad_(), torch.tensor(100.0, device=DEVICE)]
    log_z = log_partitions(*batch)
    loss = amortized_contrastive_loss(*batch, *log_z)
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, batch[:2]))


@needs_kernels
def test_under_autocast_float32_embeddings_take_the_kernels():
    batch = [leaf.detach().to(DEVICE).requires_grad_() for leaf in make_batch(50, dtype=torch.float32)]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        log_z = log_partitions(*batch)
    halves = log_partitions(batch[0].bfloat16(), batch[1].bfloat16(), batch[2])
    assert torch.equal(log_z[0], halves[0]) and torch.equal(log_z[1], halves[1])
    (gradient,) = torch.autograd.grad(log_z[0].sum(), batch[:1])
    assert gradient.dtype == torch.float32


@pytest.mark.skipif(kernels.INTERPRETED, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_kernels_compile_for_gpus(dtype, capability):
    """To machine code that multiplies on tensor cores and fits into every such GPU's shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for kernel in (kernels._log_sum_exps_kernel, kernels._exponential_weights_kernel):
        types = dict.fromkeys(("scale", "by_row", "by_column", "a", "b", "u", "v", "sums"), "*fp32")
        types |= {"x": f"*{dtype}", "y": f"*{dtype}", "weights": "*bf16" if dtype == "bf16" else "*fp32"}
        types |= {"log_weight": "fp32", **dict.fromkeys(kernels.BLOCKS, "constexpr")}
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        aligned = {
            (k,): [["tt.divisibility", 16]]
            for k, name in enumerate(kernel.arg_names)
            if signature[name].startswith("*") or name == "dim"
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=kernels.BLOCKS, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kernels.OPTIONS)
        assert "mma" in compiled.asm["ptx"] and "st.local" not in compiled.asm["ptx"]
        assert 64 * 1024 <= compiled.metadata.shared <= 99 * 1024  # loads overlap products, on small GPUs too
