"""Complete, atomic checkpoints: written to a temporary folder, flushed to disk, then renamed; checksums show damage."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from accelerate import Accelerator
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers import ProcessorMixin

from modeling_amorlip.cli_amorlip import UserError
from training.run.processes import is_connection_error
from training.run.train_state import TrainState
from training.run.weights import TrainedWeights


STATE_FILE = "train_state.json"
PROCESSOR_FOLDER = "processor"
UNSUPPORTED = {
    getattr(errno, name)
    for name in ("ENOLCK", "ENOSYS", "EOPNOTSUPP", "ENOTSUP", "EINVAL", "EBADF", "EISDIR", "EACCES", "EPERM")
}
"""What file systems answer to a lock or a flush that they do not implement."""
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)
"""What says that a file cannot be written: torch and safetensors wrap the system's error in errors of their own."""


@contextlib.contextmanager
def explain_write_errors(
    what: str, output_dir: Path, errors: tuple[type[BaseException], ...] = WRITE_ERRORS
) -> Iterator[None]:
    """Raise a `UserError` if the block cannot write (no space, no permission).

    Args:
        what: subject of the message, such as "The model".
        output_dir: folder of the run; the message names its newest checkpoint.
        errors: what counts as such.
    """
    try:
        yield
    except errors as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # not from the system; Pillow raises such errors for broken images
        if is_connection_error(error):
            raise
        saved = list_checkpoints(output_dir)
        newest = f"{saved[-1].name} is whole" if saved else "There is no checkpoint"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{what} cannot be written to {output_dir}: {reason}. {newest}; make room or permit writing, then continue "
            "with --resume_from_checkpoint latest."
        ) from error


def save_checkpoint(
    accelerator: Accelerator,
    weights: TrainedWeights,
    output_dir: Path,
    state: TrainState,
    processor: ProcessorMixin,
    keep_last: int,
    keep_every: int = 0,
) -> None:
    """Write `checkpoints/step_XXXXXXXX`, then remove old checkpoints. All processes must call this.

    Args:
        accelerator: holds the objective and random states.
        weights: the model, its optimizer and the average of its weights.
        output_dir: folder of the run.
        state: position of the run.
        processor: saved with the rest, so that a checkpoint can be resumed in another folder.
        keep_last: number of newest checkpoints to keep.
        keep_every: also keep checkpoints whose step is a multiple of this; 0 keeps no others.

    Raises:
        UserError: it cannot be written. Older checkpoints are unchanged then.
    """
    folder = output_dir / "checkpoints"
    final, temporary = folder / f"step_{state.step:08d}", folder / f".writing_{state.step:08d}"
    try:
        with explain_write_errors(f"The checkpoint of step {state.step}", output_dir):
            if accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            accelerator.wait_for_everyone()
            weights.save(accelerator, temporary)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                processor.save_pretrained(temporary / PROCESSOR_FOLDER)
                _publish(temporary, final, state)
    except UserError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if accelerator.is_main_process:
        for old in list_checkpoints(output_dir)[:-keep_last]:
            if not (keep_every and int(old.name.removeprefix("step_")) % keep_every == 0):
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _publish(temporary: Path, final: Path, state: TrainState) -> None:
    """Add state and checksums to a temporary folder, flush it to disk, and give it its final name."""
    checksums = {
        file.relative_to(temporary).as_posix(): _hash_file(file) for file in temporary.rglob("*") if file.is_file()
    }
    (temporary / STATE_FILE).write_text(json.dumps({**state.to_dict(), "sha256": checksums}))
    for path in temporary.rglob("*"):
        _flush(path)
    _flush(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _flush(final.parent)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in (output_dir / "checkpoints").glob(f"step_*/{STATE_FILE}"))


def set_aside_later_checkpoints(output_dir: Path, step: int) -> None:
    """Rename the checkpoints after the step that a run continues from.

    They belong to steps that are done again: they would count among the newest ones, and be resumed by "latest".
    """
    later = [path for path in list_checkpoints(output_dir) if int(path.name.removeprefix("step_")) > step]
    for path in later:
        aside = path.with_name(path.name.replace("step_", "set_aside_"))
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    if later:
        print(f"The checkpoints after step {step} are set aside as {later[0].parent}/set_aside_*; remove them at will.")


def find_checkpoint(output_dir: Path, resume_from: str) -> Path | None:
    """Return the folder that `resume_from_checkpoint` names.

    Args:
        output_dir: folder of the run.
        resume_from: a checkpoint's folder, or "latest" for the newest whole one of the run.

    Returns:
        None for "latest" of a run that was stopped before its first checkpoint.

    Raises:
        UserError: the folder is not a whole checkpoint, or there is no run for "latest".
    """
    if resume_from == "latest":
        return _find_latest(output_dir)
    folder = Path(resume_from)
    if not (folder / STATE_FILE).is_file():
        raise UserError(
            f"resume_from_checkpoint {resume_from} is not a checkpoint (it holds no {STATE_FILE}); "
            "name a folder checkpoints/step_XXXXXXXX, or 'latest'."
        )
    if damage := find_damage(folder):
        raise UserError(f"resume_from_checkpoint {folder} is damaged ({damage}); name another, or 'latest'.")
    return folder


def _find_latest(output_dir: Path) -> Path | None:
    if not output_dir.is_dir():
        raise UserError(f"resume_from_checkpoint latest: {output_dir} does not exist; omit it to start a run.")
    if not (output_dir / "run_config.yaml").exists():
        raise UserError(f"resume_from_checkpoint latest: {output_dir} holds no run; omit it to start one.")
    for folder in reversed(list_checkpoints(output_dir)):
        damage = find_damage(folder)
        if damage is None:
            return folder
        print(f"Checkpoint {folder} is damaged ({damage}); trying the one before it.", file=sys.stderr)
    return None


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint (a missing or changed file), or None if it is whole."""
    try:
        checksums = json.loads((folder / STATE_FILE).read_text())["sha256"]
    except (OSError, ValueError, KeyError):
        return f"{STATE_FILE} cannot be read"
    for name, checksum in checksums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _hash_file(folder / name) != checksum:
            return f"{name} has changed since it was written"
    return None


def read_train_state(folder: Path) -> TrainState:
    """Return the position of the run that a checkpoint holds."""
    return TrainState.from_dict(json.loads((folder / STATE_FILE).read_text()))


def load_checkpoint(accelerator: Accelerator, weights: TrainedWeights, folder: Path, state: TrainState) -> TrainState:
    """Restore model, optimizer, objective and random states, and return the position of the run.

    Another number of processes may continue a run if the global batch size is the same; dropout then draws other random
    numbers.

    Args:
        accelerator: holds the objective and random states.
        weights: the model, its optimizer and the average of its weights.
        folder: the checkpoint.
        state: a fresh state, with the layout of this run.

    Raises:
        UserError: the global batch size differs, which would change the position in the data, or model, optimizer or
            objective are others.
    """
    saved, processes = read_train_state(folder), accelerator.num_processes
    if saved.global_batch_size != state.global_batch_size:
        raise UserError(
            f"{folder} was written with {saved.global_batch_size} pairs per step over {saved.num_processes} processes, "
            f"but this run has {state.global_batch_size} over {processes}: set per_device_train_batch_size to "
            f"{saved.global_batch_size / processes:g}."
        )
    try:
        weights.load(accelerator, folder)
    except (RuntimeError, ValueError, KeyError, CheckpointException) as error:
        if is_connection_error(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{folder} does not fit the settings of this run ({reason}). Resume with the old values; to change what "
            "is trained, start a new run with --model, a folder with the finished model."
        ) from error
    if saved.num_processes != processes:
        accelerator.print(
            f"A run of {saved.num_processes} processes continues with {processes}: the samples and the mathematics are "
            "the same, but random numbers (dropout) and rounding differ; it is not the same to the last bit."
        )
    saved.num_processes = processes
    saved.steps_per_epoch, saved.num_pairs, saved.data = state.steps_per_epoch, state.num_pairs, state.data
    return saved


def find_processor(checkpoint: Path, output_dir: Path) -> Path:
    """Return the folder with the processor of a resumed run: the checkpoint's, its run's, or the output folder's."""
    candidates = (checkpoint / PROCESSOR_FOLDER, checkpoint.parent.parent, output_dir)
    for folder in candidates:
        if (folder / "tokenizer_config.json").is_file():
            return folder
    raise UserError(
        f"The tokenizer of {checkpoint} is neither in it nor in {candidates[1]}: copy the tokenizer files of the run "
        f"to {candidates[0]}."
    )


def lock_folder(folder: Path) -> IO[str]:
    """Claim a folder for as long as the returned file stays open.

    Raises:
        UserError: another run has it.
    """
    file = (folder / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise UserError(
            f"output_dir {folder} is in use by another run (process {owner}): wait for it, or choose another folder."
        ) from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _warn_once(f"The file system of {folder} has no locks ({error.strerror}): start only one run in this folder.")
    _close_in_forked_processes(file)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _close_in_forked_processes(file: IO[str]) -> None:
    """Keep a lock from outliving its process: forked data workers have its files open, and end seconds later."""
    reference = weakref.ref(file)

    def close() -> None:
        if (inherited := reference()) is not None:
            inherited.close()

    os.register_at_fork(after_in_child=close)


def _hash_file(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk, if its file system can tell."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        kind = "folders" if path.is_dir() else "files"
        _warn_once(
            f"The file system cannot flush {kind} to disk ({error.strerror}): after a power failure the newest "
            "checkpoint may be damaged, which its checksums would show."
        )


@functools.cache
def _warn_once(message: str) -> None:
    print(message, file=sys.stderr)
