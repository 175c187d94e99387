"""What a run looks out for: pairs that cannot be used, gradients that are not finite, jumps of the loss."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, deque

import torch
from safetensors.torch import save_file
from torch import Tensor

from modeling_amorlip.cli_amorlip import UserError
from training.config import PretrainConfig
from training.run.run_logger import RunLogger


FEWEST_PAIRS = 1000  # met before a share of them is judged
FEWEST_LOSSES, MOST_LOSSES = 20, 50  # logged losses that a new one is held against
SPIKE = 6.0  # standard deviations


class Guards:
    """
    Counts of one process, and when they are too many.

    Args:
        logbook: where `bad_samples` and `loss_spikes` are listed.
        rank: of this process, in the name of the file that a batch is kept in.
        skipped: steps skipped before, by the run that is continued.
        device: of training, where skipped steps are counted.
    """

    def __init__(self, arguments: PretrainConfig, logbook: RunLogger, rank: int, skipped: int, device: torch.device):
        self.arguments, self.logbook, self.rank = arguments, logbook, rank
        self.pairs, self.bad = 0, Counter()
        self.skipped = torch.full((), float(skipped), device=device)
        self.skipped_in_a_row = torch.zeros((), device=device)
        self.losses: deque[float] | None = None

    def list_bad_samples(self, batch: dict, step: int) -> None:
        """Takes `bad_samples` out of a batch and lists them; raises `UserError` when they are too many."""
        bad = batch.pop("bad_samples")
        self.pairs += len(batch.get("sample_ids", ()))
        for entry in bad:
            self.logbook.append("bad_samples", {"step": step, **entry})
            self.bad[entry["cause"]] += 1
        number, limit = sum(self.bad.values()), self.arguments.max_bad_fraction
        if bad and (not batch or number > limit * max(FEWEST_PAIRS, self.pairs)):
            causes = ", ".join(f"{cause} {count}" for cause, count in self.bad.most_common())
            last = bad[-1]
            raise UserError(
                f"{number} pairs could not be used ({causes}), more than max_bad_fraction {limit}. The last, "
                f"{last['key']} of {last['shard']}: {last['reason']}. All are in "
                f"{self.logbook.folder / 'bad_samples.jsonl'}: mend or drop them, or raise max_bad_fraction."
            )

    def count(self, skipped: Tensor) -> None:
        """Notes whether a step was skipped, [] of 0 or 1, without reading it."""
        self.skipped += skipped
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skipped

    def check_finite(self, logged: dict, batch: dict) -> None:
        """Raises `UserError` after `max_skipped_steps` in a row, with what is known; the batch is kept in a file."""
        number = int(self.skipped_in_a_row.item())
        if number < self.arguments.max_skipped_steps:
            return
        file = self.logbook.folder / f"not_finite_{self.rank}.safetensors"
        tensors = {name: value.contiguous().cpu() for name, value in batch.items() if isinstance(value, Tensor)}
        save_file(tensors, file)
        names = ("loss", "logit_scale", "grad_norm", "parameter/vision", "parameter/text")
        known = ", ".join(f"{name} {logged[name]:.4g}" for name in names if name in logged)
        raise UserError(
            f"Gradients were not finite in the last {number} steps, all skipped; the run stops at step "
            f"{logged['step']} ({known}). The batch, with its sample_ids, is in {file}. Lower learning_rate or "
            "max_logit_scale, lengthen warmup_steps, or use mixed_precision no; then go on from a checkpoint."
        )

    def spike(self, logged: dict, sample_ids: Tensor) -> str | None:
        """A sentence on a loss far above those logged before, which is also listed with its batch; else None."""
        if self.losses is None:
            before = [json.loads(line)["loss"] for line in self.logbook.lines("metrics")]
            self.losses = deque((loss for loss in before if loss is not None and math.isfinite(loss)), MOST_LOSSES)
        loss, usual = logged["loss"], list(self.losses)
        if not math.isfinite(loss):
            return None  # the step was skipped, which is counted
        self.losses.append(loss)
        if len(usual) < FEWEST_LOSSES:
            return None
        mean, deviation = statistics.fmean(usual), statistics.stdev(usual)
        if loss <= mean + SPIKE * deviation:
            return None
        known = {name: logged[name] for name in ("step", "loss", "logit_scale", "grad_norm")}
        known |= {"mean": mean, "standard_deviation": deviation, "sample_ids": sample_ids.tolist()}
        self.logbook.append("loss_spikes", known)
        return (
            f"Loss {loss:.4g} at step {logged['step']} after {mean:.4g} ± {deviation:.2g} "
            f"(gradient norm {logged['grad_norm']:.3g}, logit scale {logged['logit_scale']:.3g})."
        )
