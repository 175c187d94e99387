"""List pairs that could not be used, and stop the run when they are too many."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from modeling_amorlip.cli_amorlip import UserError
from training.run.run_logger import RunLogger, step_of


MIN_PAIRS = 1000
"""Pairs that count at least when the fraction of bad ones is judged."""
LOG = "bad_samples"


class BadSampleLog:
    """List the bad samples of this process, and count them by cause.

    A run of several processes has a file per process, `bad_samples_RANK.jsonl`, since not every file system keeps
    lines apart that several processes append to one file. `merge_bad_samples` joins them.

    Args:
        logger: logs of the run.
        max_fraction: fraction of the pairs read so far that may be bad.
        rank: of this process.
        num_processes: of the run.
    """

    def __init__(self, logger: RunLogger, max_fraction: float, rank: int, num_processes: int):
        self.logger, self.max_fraction = logger, max_fraction
        self.name = LOG if num_processes == 1 else f"{LOG}_{rank}"
        self.num_pairs = 0
        self.causes: Counter[str] = Counter()

    def record(self, batch: dict[str, Any], step: int) -> None:
        """Remove `bad_samples` from a batch and list them.

        Raises:
            UserError: there are too many, or the batch could not be filled.
        """
        bad_samples = batch.pop("bad_samples")
        self.num_pairs += len(batch.get("sample_ids", ()))
        for entry in bad_samples:
            self.logger.append(self.name, {"step": step, **entry})
            self.causes[entry["cause"]] += 1
        number = sum(self.causes.values())
        if bad_samples and (not batch or number > self.max_fraction * max(MIN_PAIRS, self.num_pairs)):
            causes = ", ".join(f"{cause} {count}" for cause, count in self.causes.most_common())
            last = bad_samples[-1]
            raise UserError(
                f"{number} pairs could not be used ({causes}), more than max_bad_fraction {self.max_fraction}. The "
                f"last one is {last['key']} of {last['shard']}: {last['reason']}. All are listed in "
                f"{self.logger.folder / self.name}.jsonl: repair or remove them, or raise max_bad_fraction."
            )


def merge_bad_samples(folder: Path, last_step: int) -> None:
    """Move the lines of `bad_samples_RANK.jsonl` up to `last_step` into `bad_samples.jsonl`, ordered by step.

    Later lines belong to steps that a stopped run repeats.
    """
    parts = sorted(folder.glob(f"{LOG}_*.jsonl"))
    if not parts:
        return
    merged = folder / f"{LOG}.jsonl"
    entries = []
    for path in (merged, *parts):
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()  # a last line may be cut
        entries += [json.loads(line) for line in lines if step_of(line) <= last_step]
    entries.sort(key=lambda entry: entry["step"])
    temporary = folder / f".{LOG}.writing"
    temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    os.replace(temporary, merged)
    for path in parts:
        path.unlink()
