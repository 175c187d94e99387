"""Which settings of a run may change when it is resumed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from modeling_amorlip.cli_amorlip import UserError
from training.config import PretrainConfig, unknown_name
from training.run.checkpointing import find_checkpoint
from training.run.run_logger import read_run_config


CHANGEABLE = {
    # Where the run writes, what it resumes from, and how often it saves, logs and evaluates.
    *("output_dir", "resume_from_checkpoint", "override", "checkpoint_every", "keep_last", "keep_every", "log_every"),
    *("eval_every", "eval_tasks", "eval_data_dir", "push_to_hub", "report_to", "debug_pixels", "ddp_timeout"),
    # How long it trains; the learning rate follows the new length.
    *("max_steps", "num_train_epochs"),
    # How the same step is computed: the batch of all processes is checked against the checkpoint's.
    *("per_device_train_batch_size", "dataloader_num_workers"),
    # When it gives up.
    *("max_bad_fraction", "max_skipped_steps"),
}
"""Settings that a resumed run may change freely; any other needs `override`."""


@dataclasses.dataclass(frozen=True)
class Change:
    """A setting, by its dotted name, whose value differs from the run that is resumed."""

    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.name} is {self.new!r}, and was {self.old!r}"


def find_resumed(output_dir: Path, resume_from: str) -> Path | None:
    """Return the checkpoint that a run continues from; None for the first step of the run in `output_dir`.

    Args:
        output_dir: folder of the run.
        resume_from: "latest" or a checkpoint's folder. The latest of a run that was stopped before its first checkpoint
            is the one that it began with, if any.

    Raises:
        UserError: there is no such checkpoint, or the folder holds a run that did not begin with it.
    """
    checkpoint = find_checkpoint(output_dir, resume_from)
    if not (output_dir / "run_config.yaml").exists():
        return checkpoint
    if checkpoint is not None and output_dir.resolve() in checkpoint.resolve().parents:
        return checkpoint
    origin = read_run_config(output_dir).get("resume_from_checkpoint") or "latest"
    if checkpoint is None:
        return None if origin == "latest" else find_checkpoint(output_dir, origin)
    if origin == "latest" or Path(origin).resolve() != checkpoint.resolve():
        raise UserError(
            f"output_dir {output_dir} already holds another run, which would be overwritten: continue that one with "
            "--resume_from_checkpoint latest, or choose another output_dir."
        )
    return checkpoint


def check_resumed_config(saved: PretrainConfig, current: PretrainConfig) -> list[Change]:
    """Return what a resumed run changes, after checking that it may.

    Args:
        saved: Configuration of the run's first start.
        current: Configuration to resume with; `override` names settings that may change beside `CHANGEABLE`, either
            fields or members of mappings by their dotted names.

    Raises:
        UserError: A setting changed that is neither in `CHANGEABLE` nor in `override`, or `override` names an unknown
            setting.
    """
    names = [field.name for field in dataclasses.fields(current)]
    for name in current.override:
        if name.split(".")[0] not in names:
            raise UserError(unknown_name("field in override:", name, names))
    changes = find_changes(dataclasses.asdict(saved), dataclasses.asdict(current))
    refused = [change for change in changes if not _is_allowed(change.name, current.override)]
    if refused:
        raise UserError(
            f"The run to resume has other settings: {'; '.join(map(str, refused))}. Resume with the old values, or "
            f"allow the change with --override {' '.join(change.name for change in refused)}."
        )
    return changes


def find_changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[Change]:
    """Return the settings whose values differ, those in mappings by their dotted names; a missing one is None."""
    changes = []
    for name in [*old, *(name for name in new if name not in old)]:
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += find_changes(before, after, f"{prefix}{name}.")
        elif before != after:
            changes.append(Change(f"{prefix}{name}", before, after))
    return changes


def _is_allowed(name: str, override: list[str]) -> bool:
    """Return whether a setting, or a mapping that it is a member of, may change."""
    parts = name.split(".")
    parents = {".".join(parts[: depth + 1]) for depth in range(len(parts))}
    return bool(parents & (CHANGEABLE | set(override)))
