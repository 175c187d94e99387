"""Ways of scoring candidates for a query."""

from __future__ import annotations

import torch
from torch import Tensor

from modeling_amorlip.cli_amorlip import UserError
from modeling_amorlip.tiles_amorlip import log_sum_exps


SCORINGS = ("cosine", "gallery", "amortized")


def require_amortizer(model, scorings: tuple[str, ...]) -> None:
    """Raises `UserError` when a model without heads is to score with them."""
    if "amortized" in scorings and not hasattr(model, "amortizer"):
        raise UserError("--scoring amortized needs a model with amortizer heads; this one has none.")


def log_partition_corrections(model, scorings: tuple[str, ...], gallery: Tensor, candidates: Tensor, side: str) -> dict:
    """What each way of scoring takes off a candidate's cosine similarities: {scoring: [C] or None}.

    `gallery` subtracts the candidate's exact log-partition over the queries that are there, `amortized` the amortizer's
    estimate of it (paper Section 3.2), both in units of the cosine.

    Args:
        gallery: [G, d], embeddings of the queries. candidates: [C, d]. side: what the candidates are, image or text.
    """
    result: dict[str, Tensor | None] = {"cosine": None}
    scale = getattr(model, "logit_scale", torch.zeros(())).detach().float().exp().cpu()
    zero = torch.zeros(())
    if "gallery" in scorings:
        _, log_z = log_sum_exps(gallery, candidates, scale, zero, 0, 1.0, 1024)
        result["gallery"] = log_z / scale
    if "amortized" in scorings:
        with torch.inference_mode():
            inputs = candidates.to(model.device)
            log_z = model.amortizer(inputs, inputs, scale.to(model.device))[0 if side == "image" else 1]
        result["amortized"] = log_z.cpu() / scale
    return result
