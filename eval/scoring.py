"""Ways of scoring candidates for a query."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modeling_amorlip.cli_amorlip import UserError
from modeling_amorlip.tiles_amorlip import log_sum_exps


SCORING_MODES = {"cosine": "inductive", "gallery": "transductive", "amortized": "inductive"}
"""Ways of scoring. Transductive ones use all queries of the test set to score each of them."""
SCORINGS = tuple(SCORING_MODES)


def require_amortizer(model: Any, scorings: tuple[str, ...]) -> None:
    """Raise `UserError` when a model without amortizer heads is to score with them."""
    if "amortized" in scorings and not hasattr(model, "amortizer"):
        raise UserError("--scoring amortized needs a model with amortizer heads; this one has none.")


def log_partition_corrections(
    model: Any, scorings: tuple[str, ...], gallery: Tensor, candidates: Tensor, side: str
) -> dict[str, Tensor | None]:
    """Return what each way of scoring subtracts from a candidate's cosine similarities: {scoring: [C] or None}.

    `gallery` subtracts the candidate's exact log-partition over the queries at hand, `amortized` the amortizer's
    estimate of it (paper Section 3.2), both in units of the cosine.

    Args:
        gallery: Embeddings of the queries, [G, d].
        candidates: Embeddings of the candidates, [C, d].
        side: What the candidates are, "image" or "text".
    """
    result: dict[str, Tensor | None] = {"cosine": None}
    scale = getattr(model, "logit_scale", torch.zeros(())).detach().float().exp().cpu()
    zero = torch.zeros(())
    if "gallery" in scorings:
        _, log_z = log_sum_exps(gallery, candidates, scale, zero, 0, 1.0, 1024)
        result["gallery"] = log_z / scale
    if "amortized" in scorings:
        result["amortized"] = _amortized_log_partitions(model, candidates, side) / scale
    return result


@torch.inference_mode()
def _amortized_log_partitions(model: Any, candidates: Tensor, side: str) -> Tensor:
    inputs, scale = candidates.to(model.device), model.logit_scale.detach().float().exp()
    return model.amortizer(inputs, inputs, scale)[0 if side == "image" else 1].cpu()
