"""Complete, atomic checkpoints: written aside, flushed to disk, then renamed; with checksums, so that damage shows."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from accelerate import Accelerator
from safetensors import SafetensorError

from modeling_amorlip.cli_amorlip import UserError


STATE_FILE = "train_state.json"


@dataclass
class TrainState:
    """Where a run stands; the position in the data follows from the step.

    Attributes:
        order_version: version of the data order (`training.data.order`); checkpoints without one have the first.
    """

    step: int = 0
    samples_seen: int = 0
    num_processes: int = 1
    global_batch_size: int = 0
    skipped_steps: int = 0
    best_value: float | None = None
    order_version: int = 1


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, state: TrainState, keep_last: int, keep_every: int = 0
) -> None:
    """Writes `checkpoints/step_XXXXXXXX`, then removes old ones. All processes take part.

    The newest `keep_last` stay, and those whose step is a multiple of `keep_every`, if it is not 0.

    Raises:
        UserError: it cannot be written (no space, no permission). Older checkpoints are as they were.
    """
    folder = output_dir / "checkpoints"
    final, aside = folder / f"step_{state.step:08d}", folder / f".writing_{state.step:08d}"
    try:
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(aside), safe_serialization=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            files = {file.relative_to(aside).as_posix(): _digest(file) for file in aside.rglob("*") if file.is_file()}
            (aside / STATE_FILE).write_text(json.dumps({**asdict(state), "sha256": files}))
            for file in aside.rglob("*"):
                _flush(file)
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            _flush(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap what the system says
        shutil.rmtree(aside, ignore_errors=True)
        saved = list_checkpoints(output_dir)
        raise UserError(
            f"The checkpoint of step {state.step} cannot be written to {folder}: {str(error).splitlines()[0]}. "
            f"{f'{saved[-1].name} is whole' if saved else 'There is none before it'}; make room or permit writing, "
            "then go on with --resume_from_checkpoint latest."
        ) from error
    if accelerator.is_main_process:
        for old in list_checkpoints(output_dir)[:-keep_last]:
            if not (keep_every and int(old.name.removeprefix("step_")) % keep_every == 0):
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
        for folder in reversed(list_checkpoints(output_dir)):
            damage = find_damage(folder)
            if damage is None:
                return folder
            print(f"Checkpoint {folder} is damaged ({damage}); trying the one before it.", file=sys.stderr)
        return None
    folder = Path(resume_from)
    if not (folder / STATE_FILE).is_file():
        raise UserError(
            f"resume_from_checkpoint {resume_from} is not a checkpoint (it holds no {STATE_FILE}); "
            "name a folder checkpoints/step_XXXXXXXX, or 'latest'."
        )
    if damage := find_damage(folder):
        raise UserError(f"resume_from_checkpoint {folder} is damaged ({damage}); name another, or 'latest'.")
    return folder


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: a file that is missing, or not as it was written. None when all is well."""
    try:
        files = json.loads((folder / STATE_FILE).read_text())["sha256"]
    except (OSError, ValueError, KeyError):
        return f"{STATE_FILE} cannot be read"
    for name, digest in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _digest(folder / name) != digest:
            return f"{name} is not as it was written"
    return None


def load_checkpoint(accelerator: Accelerator, folder: Path, global_batch_size: int) -> TrainState:
    """Restores model, optimiser, objective and random states from a checkpoint.

    Another number of processes may take over as long as the batch is as large; it draws other random numbers.

    Raises:
        UserError: the batch would be of another size, so that the position in the data were lost.
    """
    values = json.loads((folder / STATE_FILE).read_text())
    del values["sha256"]
    state, processes = TrainState(**values), accelerator.num_processes
    if state.global_batch_size != global_batch_size:
        raise UserError(
            f"{folder} was written with {state.global_batch_size} pairs a step over {state.num_processes} processes, "
            f"and this run has {global_batch_size} over {processes}: set per_device_train_batch_size to "
            f"{state.global_batch_size / processes:g}."
        )
    accelerator.load_state(str(folder))
    if state.num_processes != processes:
        accelerator.print(
            f"Resuming with {processes} processes a run of {state.num_processes}: the same samples and the same "
            "mathematics, but other random numbers (dropout) and other rounding; not the same to the last bit."
        )
    state.num_processes = processes
    return state


def lock_folder(folder: Path) -> IO[str]:
    """Claims a folder for as long as the returned file stays open; raises `UserError` when another run has it."""
    file = (folder / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip()
        raise UserError(
            f"output_dir {folder} is in use by another run (process {owner}): wait for it, or choose another folder."
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
