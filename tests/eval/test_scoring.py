"""Ways of scoring against float64 brute force."""

from types import SimpleNamespace

import pytest
import torch

from eval.scoring import SCORING_MODES, SinkhornSettings, log_partition_corrections, scoring_name
from modeling_amorlip.cli_amorlip import UserError


SCALE = 20.0


def unit(*shape, seed):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1)


@pytest.fixture
def embeds():
    """50 queries around 7 candidates, some of them far more often than others."""
    candidates = unit(7, 16, seed=0)
    chosen = torch.arange(50).square() % 7
    return torch.nn.functional.normalize(candidates[chosen] + unit(50, 16, seed=1), dim=-1), candidates


MODEL = SimpleNamespace(logit_scale=torch.tensor(SCALE).log())


def correct(scoring, embeds, **options):
    return log_partition_corrections(MODEL, (scoring,), *embeds, "text", **options)[scoring_name(scoring)]


def brute_force_sinkhorn(queries, candidates, iterations, temperature, shares):
    """Scale the plan's columns and rows in turns, in float64; return it after columns were scaled."""
    plan = (SCALE / temperature * queries.double() @ candidates.double().T).exp()
    for iteration in range(iterations):
        if iteration:
            plan /= plan.sum(1, keepdim=True)
        plan *= shares * len(queries) / plan.sum(0)
    return plan


def test_exact_subtracts_log_partitions_over_queries(embeds):
    queries, candidates = (part.double() for part in embeds)
    expected = (SCALE * queries @ candidates.T).logsumexp(0) / SCALE
    for name in ("exact", "gallery"):
        torch.testing.assert_close(correct(name, embeds).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("prior", [None, torch.arange(1.0, 8.0)])
def test_sinkhorn_scores_are_those_of_the_plan(embeds, iterations, temperature, prior):
    queries, candidates = embeds
    settings = SinkhornSettings(iterations, temperature)
    correction = correct("sinkhorn", embeds, sinkhorn=settings, prior=prior)
    shares = torch.full((7,), 1 / 7).double() if prior is None else prior.double() / prior.sum()
    plan = brute_force_sinkhorn(queries, candidates, iterations, temperature, shares)
    scores = (SCALE / temperature * (queries @ candidates.T - correction)).double()
    torch.testing.assert_close(scores.softmax(1), plan / plan.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)


def test_sinkhorn_reaches_the_shares(embeds):
    queries, candidates = embeds
    correction = correct("sinkhorn", embeds, sinkhorn=SinkhornSettings(100))
    masses = (SCALE * (queries @ candidates.T - correction)).softmax(1).sum(0)
    torch.testing.assert_close(masses, torch.full((7,), 50 / 7), rtol=1e-3, atol=0)


def test_one_iteration_ranks_as_exact_does(embeds):
    difference = correct("sinkhorn", embeds, sinkhorn=SinkhornSettings(1)) - correct("exact", embeds)
    assert (difference - difference.mean()).abs().max() < 1e-5


def test_settings_and_models_are_checked(embeds):
    for settings in ((0, 1.0), (5, 0.0), (5, float("nan"))):
        with pytest.raises(UserError, match="--sinkhorn_"):
            SinkhornSettings(*settings)
    assert {n for n, mode in SCORING_MODES.items() if mode == "transductive"} == {"exact", "sinkhorn"}
