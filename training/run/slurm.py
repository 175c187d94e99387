"""Join the processes of a Slurm step that was started by `srun` without another launcher."""

from __future__ import annotations

import os
import re

from modeling_amorlip.cli_amorlip import UserError


BASE_PORT, NUM_PORTS = 20_000, 20_000
"""Range of the ports that a step's processes meet at."""


def join_slurm_step() -> None:
    """Set torch's launcher variables from Slurm's if `srun` started several processes.

    Every process would train on its own otherwise. Variables of another launcher win: with `srun accelerate launch`,
    Slurm's tasks are launchers, not training processes.

    Raises:
        UserError: a variable of Slurm is missing.
    """
    number = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if number == 1 or "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
    if missing := [name for name in names if name not in os.environ]:
        raise UserError(
            f"srun started {number} processes but did not set {missing[0]}: start them with "
            "srun accelerate launch or srun torchrun, one launcher per machine."
        )
    rank, local_rank, nodes, job = (os.environ[name] for name in names)
    step = int(os.environ.get("SLURM_STEP_ID", "0"))
    os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"] = rank, local_rank, str(number)
    os.environ.setdefault("MASTER_ADDR", first_host(nodes))
    os.environ.setdefault("MASTER_PORT", str(BASE_PORT + (int(job) * 31 + step) % NUM_PORTS))


def first_host(node_list: str) -> str:
    """Return the first host of a Slurm node list, such as gpu003 of "gpu[003-005,7],cpu1"."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", node_list)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST {node_list!r} names no host: set MASTER_ADDR to the first one.")
    prefix, number, suffix = match.groups()
    return prefix + (number or "") + suffix
