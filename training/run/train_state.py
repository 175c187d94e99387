"""The position of a run: step, samples and position in the data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class TrainState:
    """Where a run stands. Checkpoints save it in `train_state.json`.

    Args:
        step: optimizer steps taken.
        samples_seen: pairs trained on, over all processes.
        num_processes: processes of the run.
        global_batch_size: pairs per step over all processes.
        steps_per_epoch: steps per epoch, from which the position in the data follows.
        skipped_steps: steps that were skipped for non-finite gradients.
        order_version: version of the order of the data; checkpoints that do not name one have the first.
        num_pairs: pairs of the data; 0 in checkpoints of earlier versions.
        data: fingerprint of the data; empty in checkpoints of earlier versions.
    """

    step: int = 0
    samples_seen: int = 0
    num_processes: int = 1
    global_batch_size: int = 0
    steps_per_epoch: int = 1
    skipped_steps: int = 0
    order_version: int = 1
    num_pairs: int = 0
    data: str = ""

    @property
    def epoch(self) -> int:
        """Epoch (from 0) of the next step."""
        return self.step // self.steps_per_epoch

    @property
    def at_epoch_start(self) -> bool:
        """Whether the next step is the first of its epoch."""
        return self.step % self.steps_per_epoch == 0

    def advance(self) -> None:
        """Count a step."""
        self.step += 1
        self.samples_seen += self.global_batch_size

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """Return the state that a checkpoint holds; entries of other versions are ignored."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})
