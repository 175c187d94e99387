"""What the launcher asks for, `accelerate launch` above all, decided together with the configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import psutil

from modeling_amorlip.cli_amorlip import UserError


LAUNCH_COMMANDS = (
    "accelerate",
    "accelerate-launch",
    "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli",
)


@dataclass(frozen=True)
class LauncherSettings:
    """Settings given to the launcher; None where the launcher was given none."""

    mixed_precision: str | None = None
    gradient_accumulation_steps: str | None = None


def read_launcher_settings(environ: Mapping[str, str], command: Sequence[str]) -> LauncherSettings:
    """Return the settings that the launcher was given.

    `accelerate launch` passes precision in the environment, as "no" also where nothing was asked for, and passes
    gradient accumulation to DeepSpeed only. So its own flags are read too.

    Args:
        environ: Environment variables of this process.
        command: Command line of the parent process, see `parent_command`.
    """
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return LauncherSettings(
        mixed_precision=_flag(command, "mixed_precision") or (precision if precision != "no" else None),
        gradient_accumulation_steps=_flag(command, "gradient_accumulation_steps")
        or environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
    )


def parent_command() -> list[str]:
    """Return the command line of the parent process, or an empty list where it cannot be read."""
    try:
        return psutil.Process(os.getppid()).cmdline()
    except (psutil.Error, OSError):
        return []


def choose_precision(requested: str, launcher: str | None, *, has_gpu: bool, has_bf16: bool) -> tuple[str, str]:
    """Return the precision to train in ("no", "bf16" or "fp16") and the reason for it.

    Args:
        requested: `mixed_precision` of the configuration.
        launcher: `mixed_precision` that the launcher was given, or None.
        has_gpu: Whether training runs on a GPU.
        has_bf16: Whether that GPU computes in bfloat16.

    Raises:
        UserError: Configuration and launcher contradict each other, or the hardware lacks the precision.
    """
    if launcher not in (None, "no", "bf16", "fp16"):
        raise UserError(f"The launcher asks for mixed_precision {launcher}; choose no, bf16 or fp16.")
    if requested != "auto" and launcher is not None and requested != launcher:
        raise UserError(
            f"mixed_precision is {requested} in the configuration and {launcher} in the launcher's settings: drop one, "
            "or set --mixed_precision auto to follow the launcher."
        )
    if requested != "auto":
        precision, reason = requested, f"mixed_precision {requested}"
    elif launcher is not None:
        precision, reason = launcher, "mixed_precision auto follows the launcher"
    elif has_gpu and has_bf16:
        precision, reason = (
            "bf16",
            "mixed_precision auto: the GPU computes in bfloat16; --mixed_precision no is float32",
        )
    else:
        device = "the GPU lacks bfloat16" if has_gpu else "there is no GPU"
        precision, reason = "no", f"mixed_precision auto: {device}, so float32"
    if precision == "fp16" and not has_gpu:
        raise UserError(f"mixed_precision fp16 needs a GPU, and there is none ({reason}): choose bf16 or no.")
    if precision == "bf16" and has_gpu and not has_bf16:
        raise UserError(f"mixed_precision bf16 needs a GPU that has bfloat16 ({reason}): choose fp16 or no.")
    return precision, reason


def check_gradient_accumulation(settings: LauncherSettings) -> None:
    """Refuse gradient accumulation: negatives come from the whole batch, which sums of parts do not see.

    Raises:
        UserError: The launcher asks for more than one accumulation step.
    """
    steps = settings.gradient_accumulation_steps
    if steps not in (None, "1"):
        raise UserError(
            f"The launcher asks for {steps} gradient accumulation steps, but a contrastive loss needs the whole batch "
            "at once: set it to 1, and use --micro_batch_size to save memory."
        )


def _flag(command: Sequence[str], name: str) -> str | None:
    """Return the value of a flag of `accelerate launch`, which ends where the script begins; None if it has none."""
    if not any(PurePath(word).name in LAUNCH_COMMANDS for word in command[:3]):
        return None
    scripts = [place for place, word in enumerate(command) if place > 1 and word.endswith(".py")]
    own = command[: scripts[0]] if scripts else command
    flag = f"--{name}"
    for place, word in enumerate(own):
        key, equals, value = word.partition("=")
        if key in (flag, flag.replace("_", "-")):
            return (value if equals else " ".join(own[place + 1 : place + 2])).lower()
    return None
