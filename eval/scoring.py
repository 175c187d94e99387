"""Ways of scoring candidates for a query: by cosine, with partition functions, and by Sinkhorn iterations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modeling_amorlip.cli_amorlip import UserError
from modeling_amorlip.loss_amorlip import cross_log_partitions


SCORING_MODES = {
    "cosine": "inductive",
    "exact": "transductive",
    "amortized": "inductive",
    "sinkhorn": "transductive",
}
"""Ways of scoring. Transductive ones use all queries of the test set to score each of them."""
SCORINGS = tuple(SCORING_MODES)
OLD_NAMES = {"gallery": "exact"}


def scoring_name(name: str) -> str:
    """Return a way of scoring by its present name; usable as the `type` of a command-line option."""
    return OLD_NAMES.get(name, name)


@dataclass(frozen=True)
class SinkhornSettings:
    """How `sinkhorn` iterates.

    Args:
        iterations: Rounds of normalizing over queries and over candidates.
        temperature: Divides the logits, on top of the model's own scale.
    """

    iterations: int = 10
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise UserError(f"--sinkhorn_iterations must be at least 1, got {self.iterations}.")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"--sinkhorn_temperature must be above 0, got {self.temperature}.")


def require_amortizer(model: Any, scorings: tuple[str, ...]) -> None:
    """Raise `UserError` when a model without amortizer heads is to score with them."""
    if "amortized" in scorings and not hasattr(model, "amortizer"):
        raise UserError("--scoring amortized needs a model with amortizer heads; this one has none.")
    if "amortized" in scorings and getattr(model, "has_fresh_heads", False):
        raise UserError(
            "--scoring amortized needs trained heads, and this model was saved without any: fit them with "
            "eval/apps/calibrate.py."
        )


def log_partition_corrections(
    model: Any,
    scorings: tuple[str, ...],
    gallery: Tensor,
    candidates: Tensor,
    side: str,
    *,
    sinkhorn: SinkhornSettings | None = None,
    prior: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return what each way of scoring subtracts from a candidate's cosine similarities: {scoring: [C]}.

    `cosine`, which is always there, subtracts nothing, `exact` the candidate's log-partition over the queries at hand,
    `amortized` the amortizer's estimate of it (paper Section 3.2), and `sinkhorn` the dual potential of a transport
    plan between queries and candidates; all in units of the cosine.

    Args:
        gallery: Embeddings of the queries, [G, d].
        candidates: Embeddings of the candidates, [C, d].
        side: What the candidates are, "image" or "text".
        sinkhorn: Settings of `sinkhorn`.
        prior: Expected share of queries per candidate for `sinkhorn`, [C]; uniform by default.
    """
    scorings = tuple(map(scoring_name, scorings))
    result = {"cosine": torch.zeros(len(candidates))}
    scale = getattr(model, "logit_scale", torch.zeros(())).detach().float().exp().cpu()
    if "exact" in scorings:
        result["exact"] = _log_partitions(gallery, candidates, scale)[1] / scale
    if "amortized" in scorings:
        result["amortized"] = _amortized_log_partitions(model, candidates, side) / scale
    if "sinkhorn" in scorings:
        result["sinkhorn"] = sinkhorn_correction(gallery, candidates, scale, sinkhorn or SinkhornSettings(), prior)
    return result


def sinkhorn_correction(
    queries: Tensor, candidates: Tensor, scale: Tensor, settings: SinkhornSettings, prior: Tensor | None = None
) -> Tensor:
    """Return the correction [C] of Sinkhorn scoring (Cuturi 2013), in units of the cosine.

    The plan exp(l_ij + u_i + v_j) gives each query a mass of 1 and each candidate its share of the queries. Scores
    l_ij + v_j rank candidates as the plan does. The first iteration's v is the exact log-partition of `exact` scoring.

    Args:
        queries: [Q, d], unit norm.
        candidates: [C, d], unit norm.
        scale: Factor from cosine to logit, [].
        prior: Expected share of each candidate, [C], positive; uniform by default.
    """
    scale = scale / settings.temperature
    shares = torch.ones(len(candidates)) if prior is None else prior
    log_mass = (shares.double() / shares.double().sum() * len(queries)).log().float()
    query_potentials, candidate_potentials = torch.zeros(len(queries)), torch.zeros(len(candidates))
    for iteration in range(settings.iterations):
        if iteration:
            query_potentials = -_log_partitions(queries, candidates, scale, None, candidate_potentials)[0]
        candidate_potentials = log_mass - _log_partitions(queries, candidates, scale, query_potentials)[1]
    return -candidate_potentials / scale


def _log_partitions(
    queries: Tensor,
    candidates: Tensor,
    scale: Tensor,
    query_offsets: Tensor | None = None,
    candidate_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exps of logits plus offsets over candidates, [Q], and over queries, [C].

    Offsets [Q] and [C] enter as further dimensions of the embeddings, so that one streaming kernel serves both.
    """
    if query_offsets is not None:
        queries = torch.cat([queries, query_offsets[:, None] / scale], 1)
        candidates = torch.cat([candidates, torch.ones(len(candidates), 1)], 1)
    if candidate_offsets is not None:
        queries = torch.cat([queries, torch.ones(len(queries), 1)], 1)
        candidates = torch.cat([candidates, candidate_offsets[:, None] / scale], 1)
    return cross_log_partitions(queries, candidates, scale)


@torch.inference_mode()
def _amortized_log_partitions(model: Any, candidates: Tensor, side: str) -> Tensor:
    inputs, scale = candidates.to(model.device), model.logit_scale.detach().float().exp()
    return model.amortizer(inputs, inputs, scale)[0 if side == "image" else 1].cpu()
