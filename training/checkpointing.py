"""Complete, atomic checkpoints: written aside, flushed to disk, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator

from eval.errors import UserError


STATE_FILE = "train_state.json"


@dataclass
class TrainState:
    """Where a run stands; the position in the data follows from the step."""

    step: int = 0
    samples_seen: int = 0
    num_processes: int = 1


def save_checkpoint(accelerator: Accelerator, output_dir: Path, state: TrainState, keep_last: int) -> None:
    """Writes `checkpoints/step_XXXXXXXX` and removes all but the newest `keep_last`. All processes take part."""
    folder = output_dir / "checkpoints"
    final, aside = folder / f"step_{state.step:08d}", folder / f".writing_{state.step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (aside / STATE_FILE).write_text(json.dumps(asdict(state)))
        for file in aside.rglob("*"):
            _flush(file)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _flush(folder)
        for old in list_checkpoints(output_dir)[:-keep_last]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in (output_dir / "checkpoints").glob(f"step_*/{STATE_FILE}"))


def find_checkpoint(output_dir: Path, resume_from: str) -> Path | None:
    """The folder that `resume_from_checkpoint` names; None for "latest" of a run that was stopped before its first.

    Raises:
        UserError: the folder is not a checkpoint, or "latest" of a run that never began.
    """
    if resume_from == "latest":
        if not output_dir.is_dir():
            raise UserError(f"resume_from_checkpoint latest: {output_dir} does not exist; leave it out to start anew.")
        if not (output_dir / "run_config.yaml").exists():
            raise UserError(f"resume_from_checkpoint latest: {output_dir} holds no run; leave it out to start anew.")
        found = list_checkpoints(output_dir)
        return found[-1] if found else None
    if not (Path(resume_from) / STATE_FILE).is_file():
        raise UserError(
            f"resume_from_checkpoint {resume_from} is not a checkpoint (it holds no {STATE_FILE}); "
            "name a folder checkpoints/step_XXXXXXXX, or 'latest'."
        )
    return Path(resume_from)


def load_checkpoint(accelerator: Accelerator, folder: Path) -> TrainState:
    """Restores model, optimiser, objective and random states from a checkpoint."""
    state = TrainState(**json.loads((folder / STATE_FILE).read_text()))
    if state.num_processes != accelerator.num_processes:
        raise UserError(
            f"{folder} was written by {state.num_processes} processes and this run has {accelerator.num_processes}; "
            f"start it with --num_processes {state.num_processes}."
        )
    accelerator.load_state(str(folder))
    return state


def _flush(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
