"""Count steps that were skipped for non-finite gradients, and stop the run after too many in a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from modeling_amorlip.cli_amorlip import UserError
from training.config import PretrainConfig


REPORTED_METRICS = ("loss", "logit_scale", "grad_norm", "parameter/vision", "parameter/text")


class NonFiniteGuard:
    """Count skipped steps on the device, without reading them back in a step.

    Args:
        config: `max_skipped_steps` in a row stop the run; `debug_pixels` saves images too.
        folder: where the batch of the last skipped step is saved.
        rank: of this process, in the name of that file.
        skipped: steps that the resumed run had skipped before.
        device: device of training.
    """

    def __init__(self, config: PretrainConfig, folder: Path, rank: int, skipped: int, device: torch.device):
        self.config, self.folder, self.rank = config, folder, rank
        self.skipped = torch.full((), float(skipped), device=device)
        self.skipped_in_a_row = torch.zeros((), device=device)

    def count(self, skipped: Tensor) -> None:
        """Count a step; `skipped` [] is 1 if it was skipped, else 0."""
        self.skipped += skipped
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skipped

    def check(self, logged: dict[str, Any], batch: dict[str, Any]) -> None:
        """Stop the run if the last `max_skipped_steps` steps were skipped.

        Args:
            logged: metrics of the step.
            batch: the step's batch, which is saved for debugging.

        Raises:
            UserError: so many steps were skipped.
        """
        number = int(self.skipped_in_a_row.item())
        if number < self.config.max_skipped_steps:
            return
        file = self._save(batch)
        metrics = ", ".join(f"{name} {logged[name]:.4g}" for name in REPORTED_METRICS if name in logged)
        raise UserError(
            f"Gradients were not finite in the last {number} steps, all of which were skipped; the run stops at step "
            f"{logged['step']} ({metrics}). {file} holds the sample_ids and tokens of the last batch. Lower "
            "learning_rate or max_logit_scale, raise warmup_steps, or use mixed_precision no; then resume from a "
            "checkpoint."
        )

    def _save(self, batch: dict[str, Any]) -> Path:
        """Save a batch in a folder that is not published, and return the file."""
        file = self.folder / f"not_finite_{self.rank}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {
                name: value.contiguous().cpu()
                for name, value in batch.items()
                if isinstance(value, Tensor) and (self.config.debug_pixels or name != "pixel_values")
            },
            file,
        )
        return file
