"""Every objective against float64 brute force and against definitions, at the extremes, and between process layouts."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from modeling_amorlip import AmorLIPAmortizer, tiles_amorlip
from modeling_amorlip.amortizer_amorlip import EmbeddingRing
from modeling_amorlip.configuration_amorlip import HEAD_TYPES
from modeling_amorlip.loss_amorlip import AMORTIZATION_OBJECTIVES, amortization_loss
from tests.helpers.losses import assert_close, brute_force_log_partitions, make_batch
from tests.helpers.objectives import VARIANTS, D, make_config
from training.objectives import OBJECTIVES


def make_objective(name, settings, num_samples=400, **config):
    cls = OBJECTIVES[name]
    defaults = dict(cls.model_defaults)
    if name == "neuclip":
        defaults = {"amortizer_config": {"head_type": "prototype", "size": 32}}
    torch.manual_seed(0)
    return cls(make_config(**defaults | config), cls.Arguments(**settings), num_samples=num_samples)


def brute_force_loss(name, settings, x, y, s, b=None):
    """The loss of a first step, by operations on the whole matrix."""
    n = len(x)
    logits = s * x @ y.T + (0 if b is None else b)
    diagonal = logits.diagonal()
    off = ~torch.eye(n, dtype=torch.bool)
    if name == "clip":
        return ((logits.logsumexp(1) + logits.logsumexp(0)) / 2 - diagonal).mean()
    minus_positive = logits.masked_fill(~off, -math.inf)
    decoupled = torch.stack([minus_positive.logsumexp(1), minus_positive.logsumexp(0)])
    if name == "dcl":
        return (decoupled.mean(0) - diagonal).mean()
    if name == "siglip":
        return -torch.nn.functional.logsigmoid(torch.where(off, -logits, logits)).sum() / n
    log_g = decoupled - diagonal - math.log(n - 1)
    if name in ("sogclr", "fastclip"):
        ratio = log_g.exp() / (log_g.exp().detach() + 1e-14)  # first visit: u = g
        regulariser = (log_g.detach().mean() + 6.5) / s if settings.get("version") == "v3" else 0
        return (ratio / s.detach()).mean() + regulariser
    raise AssertionError(name)


@pytest.mark.parametrize("name, settings", [v for v in VARIANTS if v[0] not in ("amorlip", "neuclip")])
@pytest.mark.parametrize("n, scale", [(2, 10.0), (64, 1.0), (200, 100.0)])
def test_rivals_equal_brute_force(name, settings, n, scale):
    bias = -10.0 if name == "siglip" else None
    config = {"logit_scale_init_value": math.log(scale)} if settings.get("version") == "v2" else {}
    objective = make_objective(name, settings, **config)
    objective.on_epoch_start(0, 10)
    batch = make_batch(n, d=D, scale=scale, bias=bias, dtype=torch.float32)
    doubles = [leaf.detach().double().requires_grad_() for leaf in batch]
    loss = objective(*batch, *([] if bias else [None]), torch.arange(n)).loss
    expected = brute_force_loss(name, settings, *doubles)
    assert_close(loss, expected.detach(), 2e-6, "value")
    gradients = torch.autograd.grad(loss, batch)
    wanted = torch.autograd.grad(expected, doubles, allow_unused=True)
    for index, (gradient, reference) in enumerate(zip(gradients, wanted, strict=True)):
        if index == 2 and (settings.get("version") in ("v1", "v2") or name == "sogclr"):
            assert gradient == 0  # the scale is not trained
        else:
            assert_close(gradient, reference, 2e-5, f"gradient {index}")


def test_neuclip_equals_brute_force():
    objective = make_objective("neuclip", {})
    batch = make_batch(50, d=D, scale=30.0, dtype=torch.float32)
    doubles = [leaf.detach().double().requires_grad_() for leaf in batch]
    output = objective(*batch)
    x, y, s = doubles
    logits = s * x @ y.T
    minus_positive = logits - torch.diag(torch.full((50,), math.inf)).nan_to_num(nan=0.0, posinf=math.inf).double()
    alphas, log_g = [], []
    for embeds, head, dim in ((x, objective.network.image_head, 1), (y, objective.network.text_head, 0)):
        prototypes = torch.nn.functional.normalize(head.prototypes.detach().double(), dim=-1)
        mean = (s * embeds @ prototypes.T - logits.diagonal()[:, None]).exp().mean(1)
        alphas.append((mean + 1e-14).log().detach())
        log_g.append(minus_positive.logsumexp(dim) - logits.diagonal() - math.log(49))
    conjugate = torch.stack([(g - a).exp() + a - 1 for g, a in zip(log_g, alphas, strict=True)]).mean()
    expected = (conjugate + 6.5) / s
    assert_close(output.metrics["conjugate_loss"], conjugate.detach(), 1e-5, "value")
    wanted = torch.autograd.grad(expected, doubles)
    for gradient, reference in zip(torch.autograd.grad(output.loss, batch), wanted, strict=True):
        assert_close(gradient, reference, 5e-5, "gradient")


@pytest.mark.parametrize(
    ("source", "reinitialize"),
    [("target_network", True), ("online", True), ("blended", True), ("blended", False), ("batch", True)],
)
def test_amorlip_equals_brute_force(source, reinitialize):
    """Algorithm 1's Stage II, with lambda taken from where it is said to come from."""
    settings = {"rho": 2.0, "beta": 0.8, "target_every": 1}
    objective = make_objective("amorlip", {"partition_source": source, "reinitialize": reinitialize, **settings})
    batch = make_batch(40, d=D, scale=20.0, bias=0.5, dtype=torch.float32)
    objective.on_epoch_start(0, 10)
    objective(*batch)
    objective.on_epoch_start(1, 10)
    assert objective.beta == pytest.approx(0.8)
    objective(*batch)  # so that target and previous heads differ
    doubles = [leaf.detach().double().requires_grad_() for leaf in batch]
    x, y, s, b = doubles
    log_z = brute_force_log_partitions(x, y, s, b)
    log_count = math.log(40 - 1 + 1e-3)
    # Without re-initialisation the blend takes the target heads as this step finds them.
    heads_in_blend = copy.deepcopy(objective.previous if reinitialize else objective.target)
    loss = objective(*batch).loss
    with torch.no_grad():
        if source == "batch":
            log_lambda = log_z
        elif source == "blended":
            previous = heads_in_blend(batch[0], batch[1], batch[2])
            log_lambda = [
                (0.8 * (p.double() + log_count).exp() + 0.2 * z.exp()).log()
                for p, z in zip(previous, log_z, strict=True)
            ]
        else:
            heads = objective.online if source == "online" else objective.target
            log_lambda = [head.double() + log_count for head in heads(batch[0], batch[1], batch[2])]
    contrastive = -2 * (s * (x * y).sum(-1) + b).mean() + sum(
        (z - a.detach()).exp().mean() for z, a in zip(log_z, log_lambda, strict=True)
    )
    expected = contrastive / s.detach() + 2.0 / s
    assert_close(loss, expected.detach(), 2e-6, "value")
    *gradients, bias_gradient = torch.autograd.grad(loss, batch)
    *wanted, bias_wanted = torch.autograd.grad(expected, doubles)
    for gradient, reference in zip(gradients, wanted, strict=True):
        assert_close(gradient, reference, 2e-5, "gradient")
    # Against the batch's own partitions the bias cancels and its gradient is 0.
    assert bias_gradient.item() == pytest.approx(bias_wanted.item(), rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("bias", [None, 0.5])
def test_amorlips_estimates_take_recent_pairs_in(bias):
    settings = {"partition_source": "batch", "recent_pairs": 60, "rho": 0.0}
    objective = make_objective("amorlip", settings)
    torch.manual_seed(0)
    batches = [make_batch(40, d=D, scale=20.0, bias=bias, dtype=torch.float32) for _ in range(3)]
    for batch in batches:
        loss = objective(*batch).loss
    *others, (x, y, s, *b) = ([leaf.detach().double() for leaf in batch] for batch in batches)
    log_z = torch.stack(brute_force_log_partitions(x, y, s, *b))
    # The rings hold the second batch and the last 20 pairs of the first, and count as much as any other pair.
    past = [torch.cat([others[1][k], others[0][k][20:]]) for k in (0, 1)]
    shift = bias or 0
    recent = torch.stack([(s * x @ past[1].T + shift).exp().sum(1), (s * y @ past[0].T + shift).exp().sum(1)])
    count = 40 - 1 + 1e-3
    log_lambda = ((log_z.exp() + recent) * count / (count + 60)).log()
    expected = (-2 * (s * (x * y).sum(-1) + shift).mean() + (log_z - log_lambda).exp().sum(0).mean()) / s
    assert_close(loss, expected, 2e-6, "value")


def test_batch_source_has_the_gradient_of_infonce_and_of_dcl():
    batch = make_batch(40, d=D, scale=20.0, dtype=torch.float32)
    for name, weight in (("clip", 1.0), ("dcl", 1e-30)):
        amorlip = make_objective("amorlip", {"partition_source": "batch", "positive_weight": weight})
        ours = torch.autograd.grad(amorlip(*batch).loss, batch)
        rival = torch.autograd.grad(make_objective(name, {})(*batch).loss, batch)
        for a, b in zip(ours, rival, strict=True):
            assert_close(a * batch[2].detach() / 2, b.double(), 1e-4, name)


# -- amortization objectives as divergences ----------------------------------------------------------------------------


def measures(log_partition, logits, prior):
    """P(y) exp(l(x, y)) / partition(x) on a small discrete space: [X, Y], a measure a row."""
    return prior * logits.exp() / log_partition.exp()[:, None]


def generalised_kl(p, q):
    return (p * (p / q).log() - p + q).sum(1)


@pytest.mark.parametrize("objective", AMORTIZATION_OBJECTIVES)
def test_amortization_objectives_are_the_divergences_they_are_named_for(objective):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 7, generator=generator).double()
    prior = torch.rand(7, generator=generator).double().softmax(0)
    log_z = (prior * logits.exp()).sum(1).log()
    log_target = log_z + 0.4 * torch.randn(5, generator=generator)
    log_lambda = (log_z + 0.7 * torch.randn(5, generator=generator)).requires_grad_()
    p, q = measures(log_target, logits, prior), measures(log_lambda, logits, prior)
    expected = {
        "l2_log": lambda: (log_lambda - log_target) ** 2,
        "kl": lambda: generalised_kl(q, p),
        "kl_sym": lambda: generalised_kl(q, p) + generalised_kl(p, q),
        "js": lambda: (generalised_kl(p, (p + q) / 2) + generalised_kl(q, (p + q) / 2)) / 2,
        "conjugate": lambda: log_z.exp() / log_lambda.exp() + log_lambda - 1,
    }[objective]()
    value = amortization_loss(log_lambda, log_target, objective=objective, log_z_batch=log_z, regularizer=0.0)
    torch.testing.assert_close(value, expected.mean())
    ours, wanted = (torch.autograd.grad(v, log_lambda, retain_graph=True)[0] for v in (value, expected.mean()))
    torch.testing.assert_close(ours, wanted)
    regularised = amortization_loss(log_lambda, log_target, objective=objective, log_z_batch=log_z)
    added = 0.1 * ((log_lambda - log_target) ** 2).mean() if objective in ("kl", "kl_sym", "js") else 0.0
    torch.testing.assert_close(regularised, value + added)


@pytest.mark.parametrize("objective", AMORTIZATION_OBJECTIVES)
def test_the_minimum_is_at_the_target(objective):
    target = torch.tensor([3.0, -2.0]).double()
    for offset in (-1.0, -0.1, 0.1, 1.0):
        assert amortization_loss(target + offset, target, objective=objective) > amortization_loss(
            target, target, objective=objective
        )


def test_conjugate_is_unbiased_in_the_estimate():
    """Its gradient at the mean of estimates is the mean of gradients, which no other objective has."""
    estimates = torch.tensor([1.0, 2.0, 9.0]).double().log()
    h = torch.zeros(1).double().requires_grad_()
    mean_of_gradients = (
        sum(
            torch.autograd.grad(amortization_loss(h, None, objective="conjugate", log_z_batch=z[None]), h)[0]
            for z in estimates
        )
        / 3
    )
    log_mean = torch.tensor([4.0]).double().log()
    value = amortization_loss(h, None, objective="conjugate", log_z_batch=log_mean)
    torch.testing.assert_close(torch.autograd.grad(value, h)[0], mean_of_gradients)


# -- heads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_type", [h for h in HEAD_TYPES if h != "residual_mlp"])
@pytest.mark.parametrize("bias", [None, -1.5])
def test_heads_with_a_formula_equal_it(head_type, bias):
    torch.manual_seed(0)
    amortizer = AmorLIPAmortizer(make_config(amortizer_config={"head_type": head_type, "size": 20}))
    x, y, s = make_batch(10, d=D, scale=15.0, dtype=torch.float32)
    if amortizer.observes:
        amortizer.observe(x, y)
    prediction = amortizer(x, y, s, bias and torch.tensor(bias))[0]
    head, images = amortizer.image_head, x.detach().double()
    if head_type == "queue":
        sums = (15 * images @ y.detach().double().T).exp().mean(1)
    elif head_type == "prototype":
        sums = (15 * images @ torch.nn.functional.normalize(head.prototypes.detach().double(), dim=-1).T).exp().mean(1)
    else:
        features = (15**0.5 * images @ head.frequencies.double().T - 7.5).exp()
        sums = features @ torch.full((20,), 1 / 20).double()
    torch.testing.assert_close(prediction.double(), sums.log() + (bias or 0), rtol=1e-5, atol=1e-5)


def test_random_features_estimate_the_kernel():
    """Proposition 1: with v = E[phi(y)] the head is the partition function, up to the variance of the features."""
    torch.manual_seed(0)
    amortizer = AmorLIPAmortizer(make_config(amortizer_config={"head_type": "random_features", "size": 200_000}))
    x, y, s = make_batch(30, d=D, scale=1.0)
    head = amortizer.image_head
    with torch.no_grad():
        features = (y @ head.frequencies.double().T - 0.5).exp()
        head.log_weights.copy_(features.mean(0).log())
        exact = (x @ y.T).exp().mean(1).log()
        torch.testing.assert_close(head(x.float(), s.float(), 0.0).double(), exact, rtol=0, atol=0.02)


@pytest.mark.parametrize("batches", [[3, 3, 3], [10, 4], [25], [4, 1, 9, 2]])
def test_the_ring_holds_the_last_embeddings(batches):
    ring, seen = EmbeddingRing(10, 1), []
    for count in batches:
        new = torch.arange(len(seen), len(seen) + count).float()
        seen += new.tolist()
        ring.push(new[:, None])
    held = sorted(ring.embeds.flatten().tolist())
    assert held == sorted(seen[-10:]) if len(seen) >= 10 else set(held) == set(seen)


# -- extremes ----------------------------------------------------------------------------------------------------------


def extreme_batches():
    unit = torch.nn.functional.normalize(torch.randn(12, D, generator=torch.Generator().manual_seed(0)), dim=-1)
    yield "identical", unit[:1].repeat(12, 1), unit[:1].repeat(12, 1)
    yield "orthogonal", torch.eye(D), torch.eye(D)
    yield "opposite", unit, -unit
    yield "one pair", unit[:1], unit[1:2]
    yield "matched", unit, unit


@pytest.mark.parametrize("name, settings", VARIANTS)
@pytest.mark.parametrize(
    "dtype, autocast",
    [(torch.float32, False), (torch.float32, True), (torch.float16, False), (torch.bfloat16, False)],
)
def test_nothing_overflows(name, settings, dtype, autocast):
    for (label, x, y), scale in itertools.product(extreme_batches(), (1.0, 100.0)):
        objective = make_objective(name, settings)
        objective.on_epoch_start(0, 4)
        leaves = [x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_(), torch.tensor(scale).requires_grad_()]
        bias = torch.tensor(-10.0).requires_grad_() if name == "siglip" else None
        for step in range(3):
            if step == 2:
                objective.on_epoch_start(1, 4)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = objective(*leaves, bias, torch.arange(len(x)))
            gradients = torch.autograd.grad(output.loss, leaves)
            for what, value in zip(("loss", "x", "y", "scale"), (output.loss, *gradients), strict=True):
                assert value.isfinite().all(), (label, scale, step, what, value)


@pytest.mark.parametrize("head_type, amortization", list(itertools.product(HEAD_TYPES, AMORTIZATION_OBJECTIVES)))
def test_no_head_overflows_with_any_amortization_objective(head_type, amortization):
    for (label, x, y), scale in itertools.product(extreme_batches(), (1.0, 100.0)):
        config = {"amortizer_config": {"head_type": head_type, "size": 8}}
        objective = make_objective("amorlip", {"amortization": amortization}, **config)
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        for scale_now in (scale, 100.0):  # a jump of the scale leaves the heads far off
            output = objective(x, y, torch.tensor(scale_now))
            values = (output.loss, *torch.autograd.grad(output.loss, [x, y]), *objective.online.parameters())
            assert all(value.isfinite().all() for value in values), (label, scale_now)


# -- state and settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, settings", VARIANTS)
def test_state_round_trip(name, settings):
    """An objective that loads another's state goes on as that one does."""
    batch = make_batch(16, d=D, scale=20.0, dtype=torch.float32)[:3]
    bias, ids = (torch.tensor(-10.0) if name == "siglip" else None), torch.arange(16)
    first, second = (make_objective(name, settings) for _ in range(2))
    for epoch in range(2):
        first.on_epoch_start(epoch, 4)
        for _ in range(3):
            first(*batch, bias, ids)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(3):
        assert torch.equal(first(*batch, bias, ids).loss, second(*batch, bias, ids).loss)


def test_fastclip_estimates_and_gamma_follow_the_paper():
    objective = make_objective("fastclip", {"gamma": 0.2})
    gammas = []
    for epoch in range(10):
        objective.on_epoch_start(epoch, 10)
        gammas.append(objective.gamma)
    assert gammas[0] == 1 and gammas[5:] == [pytest.approx(0.2)] * 5 and gammas == sorted(gammas, reverse=True)
    x, y, s = make_batch(8, d=D, scale=5.0)
    ids = torch.tensor([3, 7, 11, 13, 17, 19, 23, 29])
    g = ((s * x @ y.T).exp().sum(1) / (s * (x * y).sum(-1)).exp() - 1) / 7
    objective.on_epoch_start(0, 10)
    objective(x.float(), y.float(), s.float(), None, ids)
    torch.testing.assert_close(objective.log_u[0, ids].double(), g.log(), rtol=1e-5, atol=1e-5)
    objective.on_epoch_start(9, 10)
    objective(x.float(), y.float(), 2 * s.float(), None, ids)
    g2 = ((2 * s * x @ y.T).exp().sum(1) / (2 * s * (x * y).sum(-1)).exp() - 1) / 7
    torch.testing.assert_close(objective.log_u[0, ids].double(), (0.8 * g + 0.2 * g2).log(), rtol=1e-5, atol=1e-5)
    assert objective.log_u.isfinite().sum() == 16


def test_fastclip_averages_each_sample_at_its_own_rate():
    objective = make_objective("fastclip", {"gamma_offset": 1.5})
    ids = torch.arange(8)
    log_g = 4 * torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(0))
    objective.on_epoch_start(0, 10)
    for values in log_g:
        log_u = objective._update_estimates(values, ids)
    first, second = log_g.double()
    gamma = 1 / (1 + (-first - 1.5).exp())
    expected = ((1 - gamma) * first.exp() + gamma * second.exp()).log()
    torch.testing.assert_close(log_u.double(), expected, rtol=1e-5, atol=1e-5)


def test_fastclip_v2_moves_temperatures_downhill():
    objective = make_objective("fastclip", {"version": "v2", "rho": 0.0}, logit_scale_init_value=math.log(10.0))
    x, y, s = make_batch(8, d=D)
    objective.on_epoch_start(0, 10)
    objective(x.float(), y.float(), s.float(), None, torch.arange(8))
    tau = torch.full((8,), 0.1, dtype=torch.float64, requires_grad=True)
    exponents = (x @ y.T - (x * y).sum(-1, keepdim=True)) / tau[:, None]
    log_g = exponents.masked_fill(torch.eye(8, dtype=torch.bool), -math.inf).logsumexp(1) - math.log(7)
    (slope,) = torch.autograd.grad((tau * log_g).sum(), tau)
    moved = objective.temperature[0, :8] - 0.1
    assert torch.equal(moved.sign(), -slope.sign().float())


@pytest.mark.parametrize(
    "name, settings, config, message",
    [
        ("amorlip", {"amortization": "mse"}, {}, "amortization is 'mse'.*l2_log"),
        ("amorlip", {"partition_source": "tea"}, {}, "partition_source is 'tea'.*online"),
        ("amorlip", {"positive_weight": -1}, {}, "positive_weight must be at least 0"),
        ("fastclip", {"version": "v4"}, {}, "version is 'v4'"),
        ("fastclip", {"gamma": 0}, {}, "gamma must lie above 0"),
        ("sogclr", {"gamma": 2}, {}, "gamma must lie above 0"),
        ("neuclip", {"restart_every": 0}, {}, "restart_every must be at least 1"),
        ("neuclip", {}, {"amortizer_config": {"head_type": "queue"}}, "head_type is 'queue'"),
        ("siglip", {}, {"logit_bias_init_value": None}, "set logit_bias_init_value"),
        ("amorlip", {}, {"amortizer_config": {"size": 0}}, "size is 0"),
    ],
)
def test_contradictions_are_named(name, settings, config, message):
    with pytest.raises(Exception, match=message) as caught:
        make_objective(name, settings, **config)
    assert isinstance(caught.value, ValueError) or isinstance(caught.value.__cause__, ValueError)


def test_every_setting_has_a_default():
    for cls in OBJECTIVES.values():
        assert dataclasses.is_dataclass(cls.Arguments)
        cls.Arguments()


@pytest.mark.parametrize("name, settings", VARIANTS)
def test_a_step_never_waits_for_the_gpu(name, settings, monkeypatch):
    """On tensors without values, reading one back to the host raises an error, so a step that runs reads none."""
    monkeypatch.setattr(tiles_amorlip, "_common_shift", lambda *_: None)  # what it returns on a GPU
    objective = make_objective(name, settings)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        objective.on_epoch_start(0, 4)
        for parent in list(objective.modules()):
            for buffer, value in list(parent.named_buffers(recurse=False)):
                parent._buffers[buffer] = mode.from_tensor(value)
        embeds = [torch.randn(64, D, requires_grad=True) for _ in range(2)]
        scale, bias = (torch.ones((), requires_grad=True) for _ in range(2))
        output = objective(*embeds, scale, bias if name == "siglip" else None, torch.arange(64))
        torch.autograd.grad(output.loss, embeds)
        with pytest.raises(DataDependentOutputException):
            output.loss.item()
