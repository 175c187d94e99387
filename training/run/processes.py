"""The processes of a run: what the launcher asks for, precision, random numbers, and work for one process."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list, gather_object

from modeling_amorlip.cli_amorlip import UserError
from training.config import PretrainConfig
from training.data.mixture import Mixture
from training.run.launcher import (
    check_gradient_accumulation,
    choose_precision,
    parent_command,
    read_launcher_settings,
)
from training.run.slurm import join_slurm_step
from training.run.trackers import check_tracker


T = TypeVar("T")


def build_accelerator(config: PretrainConfig) -> Accelerator:
    """Return the Accelerator of the run.

    Raises:
        UserError: the launcher asks for something that this trainer does not do.
    """
    join_slurm_step()
    launcher = read_launcher_settings(os.environ, parent_command())
    check_gradient_accumulation(launcher)
    precision, reason = choose_precision(
        config.mixed_precision,
        launcher.mixed_precision,
        has_gpu=torch.cuda.is_available(),
        has_bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    )
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # stated explicitly, or several CPU processes do not join
        mixed_precision=precision,
        log_with=check_tracker(config.report_to),
        project_dir=config.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=config.ddp_timeout))],
    )
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UserError(
            f"Accelerate is set up for {kind.value}, which is not supported: choose one of "
            "training/accelerate_configs/."
        )
    accelerator.print(f"Precision   {precision} ({reason})")
    return accelerator


def vary_random_state(seed: int, rank: int) -> None:
    """Give each process its own random numbers for dropout; those of the first process stay as they are.

    Everything that must be the same in all processes has been initialized before.
    """
    if rank > 0:
        torch.manual_seed(seed + rank)


def run_on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Run a function on the main process and return its result in all processes.

    Raises:
        UserError: the function raised it on the main process.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def is_connection_error(error: BaseException) -> bool:
    """Return whether an error says that another process cannot be reached any more."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


@contextlib.contextmanager
def explain_lost_processes(timeout: int) -> Iterator[None]:
    """Raise a `UserError` if another process ends or cannot be reached while the block runs.

    Args:
        timeout: seconds after which a process stops waiting for the others.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_connection_error(error):
            raise
        raise UserError(
            f"Another process has ended, or could not be reached for {timeout} seconds (ddp_timeout): see its output, "
            "then continue all with --resume_from_checkpoint latest."
        ) from error


def check_same_data(accelerator: Accelerator, pairs: Mixture) -> None:
    """Check that all processes see the same pairs in the same order.

    Raises:
        UserError: some see other pairs, in all processes.
    """
    views = gather_object([(len(pairs), pairs.fingerprint())])
    others = [rank for rank, view in enumerate(views) if view != views[0]]
    if others:
        raise UserError(
            f"Processes see different data: process 0 has {views[0][0]} pairs in train_data, and process {others[0]} "
            f"has {views[others[0]][0]}, or other ones. Give every machine the same files under the same names."
        )


def check_shared(accelerator: Accelerator, file: Path) -> None:
    """Check that all processes see a file that the main process has written to the output folder.

    Raises:
        UserError: some do not.
    """
    is_there = torch.tensor(float(file.exists()), device=accelerator.device)
    if accelerator.reduce(is_there, reduction="mean").item() < 1:
        raise UserError(
            f"output_dir {file.parent} is not the same folder for all processes: name a folder on a file system that "
            "all machines share, since every process writes its part of a checkpoint there."
        )
