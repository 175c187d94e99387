"""Check documented shell commands: parse their arguments by the parsers of the programs that they start."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.checkout import ROOT
from tests.helpers.documents import split_commands


OTHER_PROGRAMS = {".", "bash", "cp", "hf", "pre-commit"}
"""Programs whose arguments are not the project's."""
PLACEHOLDERS = {"RECIPE.yaml": "training/recipes/emoji_demo.yaml"}


class _ParsedError(BaseException):
    """Ends a command line once its arguments are parsed."""


def check_command(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a command names a file, an option, an extra or a marker that does not exist."""
    program, arguments = Path(command[0]).name or command[0], command[1:]
    if program in ("python", "python3"):
        _check_python(arguments, monkeypatch)
    elif program in ("accelerate", "torchrun"):
        _check_launcher(program, arguments, monkeypatch)
    elif program == "srun":
        # The command that SLURM starts is the last word. Its variables stand for numbers and names.
        nested = re.sub(r"\$\([^)]*\)", "host", arguments[-1])
        for inner in split_commands(re.sub(r"\$SLURM_\w+", "0", nested)):
            check_command(inner, monkeypatch)
    elif program == "pip":
        _check_pip(arguments)
    elif program == "pytest":
        _check_pytest(arguments)
    else:
        assert program in OTHER_PROGRAMS, f"{program} is checked by no test"


def _check_python(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if arguments[0] == "-c":
        compile(arguments[1], "<command>", "exec")
        return
    if arguments[0] == "-m":
        module, arguments = arguments[1], arguments[2:]
    else:
        path, arguments = Path(arguments[0]), arguments[1:]
        assert (ROOT / path).is_file(), path
        module = ".".join(path.with_suffix("").parts)
    if module == "pytest":
        _check_pytest(arguments)
    elif module == "training.pretrain":
        _check_pretrain(arguments)
    # A standard module, a script without arguments, and one that an absent library parses.
    elif module != "venv" and not module.startswith(("demo_data.", "eval.apps.clip_benchmark")):
        _check_arguments(module, arguments, monkeypatch)


def _check_arguments(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse arguments by a script's own parser and stop there."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise _ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(_ParsedError):
        importlib.import_module(module).main()


def _check_pretrain(arguments: list[str]) -> None:
    from training.config import parse_config

    if arguments == ["--help"]:
        return
    config = parse_config([PLACEHOLDERS.get(argument, argument) for argument in arguments])
    if "--objective_args" in arguments:
        # The command line replaces the recipe's options: those of another objective would be unknown.
        assert config.objective_args == yaml.safe_load(arguments[arguments.index("--objective_args") + 1])


def _check_launcher(program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the launcher's options by its own parser, then those of the script that it starts."""
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        launched = get_args_parser().parse_args(arguments)
    else:
        from accelerate.commands.launch import launch_command_parser

        assert arguments[0] == "launch", arguments
        launched = launch_command_parser().parse_args(arguments[1:])
        assert launched.config_file is None or (ROOT / launched.config_file).is_file(), launched.config_file
    _check_python([launched.training_script, *launched.training_script_args], monkeypatch)


def _check_pytest(arguments: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for argument in arguments:
        assert not argument.startswith("tests/") or (ROOT / argument).exists(), argument
    if "-m" in arguments:
        for marker in set(re.findall(r"\w+", arguments[arguments.index("-m") + 1])) - {"not", "and", "or"}:
            assert f'"{marker}:' in project, f"unknown marker {marker}"


def _check_pip(arguments: list[str]) -> None:
    packaging = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("setup.py", "pyproject.toml"))
    for argument in arguments:
        if match := re.fullmatch(r"\.\[([\w,]+)\]", argument):
            for extra in match[1].split(","):
                assert f'"{extra}": ' in packaging, f"unknown extra {extra}"
        if argument.startswith("constraints"):
            assert (ROOT / argument).is_file(), argument
