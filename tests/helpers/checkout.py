"""The checkout under test, and commands run in it as a user types them."""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from types import MappingProxyType

import torch


ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo_data/emoji"
TINY = {
    "train_data": "",
    "alternative_captions_column": "captions",
    "keywords_column": "tags",
    "group_column": "concept",
    "augmentation": {"rotation": 10, "color_jitter": 0.2, "zoom": [0.9, 1.1], "horizontal_flip": 0.5},
    "projection_dim": 32,
    "vision_config": {
        "model_type": "clip_vision_model",
        "image_size": 32,
        "patch_size": 16,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "attention_dropout": 0.1,
    },
    "text_config": {
        "model_type": "clip_text_model",
        "vocab_size": 700,
        "max_position_embeddings": 32,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "objective_args": {"beta_decay_epochs": 2, "reinitialize": True},
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "warmup_steps": 2,
    "log_every": 1,
    "dataloader_num_workers": 0,
}
"""Settings of a run that takes seconds."""


def run(*command: object, launch: int | None = None, threads: int = 1, timeout: int = 300) -> CompletedProcess:
    """Run a script of the repository, or `-m MODULE`, from its root, and return exit status and output.

    It runs in this process, as `python` would run it, unless `launch` asks for processes of their own.

    Args:
        launch: number of processes of their own; several get the environment that torchrun would give them.
        threads: torch threads; sums are equal bit for bit only with equal numbers of threads.
        timeout: seconds that processes of their own may take.
    """
    words = list(map(str, command))
    return _run_in_process(words, threads) if launch is None else _run_forked(words, launch, threads, timeout)


def run_python(*words: object, threads: int = 1, timeout: int = 300) -> CompletedProcess:
    """Run Python from the repository's root in a process of its own; for tests marked `e2e`."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=timeout, env=environment_with_threads(threads)
    )


def _run_in_process(words: list[str], threads: int) -> CompletedProcess:
    stdout, stderr = io.StringIO(), io.StringIO()
    argv, folder, num_threads = sys.argv, os.getcwd(), torch.get_num_threads()
    status = 0
    try:
        os.chdir(ROOT)
        torch.set_num_threads(threads)
        _reset_accelerate()
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            try:
                _execute(words)
            except SystemExit as error:
                status = error.code if isinstance(error.code, int) else int(bool(error.code))
                if isinstance(error.code, str):
                    print(error.code, file=sys.stderr)
            except Exception:
                status = 1
                traceback.print_exc()
    finally:
        os.chdir(folder)
        sys.argv = argv
        torch.set_num_threads(num_threads)
        _reset_accelerate()
    return CompletedProcess(words, status, stdout.getvalue(), stderr.getvalue())


def _execute(words: list[str]) -> None:
    """Do what `python` does with its arguments."""
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def start_forked(
    *command: object, output: Path, processes: int = 1, patches: Mapping[str, str] = MappingProxyType({})
) -> list[BaseProcess]:
    """Start a script in processes forked from a server that has imported everything, and return the processes.

    Args:
        output: gets what they print.
        patches: values of names in modules, such as `training.data.remote.HF_HOME`, that were imported long before.
    """
    return _fork(list(map(str, command)), processes, 1, (output, output), patches)


def start_run(
    recipe_path: Path,
    folder: Path,
    *options: object,
    processes: int = 1,
    patches: Mapping[str, str] = MappingProxyType({}),
) -> list[BaseProcess]:
    """Start a training run as `start_forked` does, and return its processes once it has logged three steps."""
    output = folder.with_suffix(".log")
    command = ("training/pretrain.py", "--config", recipe_path, "--output_dir", folder, *options)
    ranks = start_forked(*command, output=output, processes=processes, patches=patches)
    wait_for_steps(folder, lambda: all(process.is_alive() for process in ranks), output.read_text)
    return ranks


def wait_for_steps(folder: Path, is_running: Callable[[], bool], output: Callable[[], str]) -> None:
    """Wait until a run has logged three steps, and fail with its output if it ends before."""
    metrics, deadline = folder / "metrics.jsonl", time.time() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert is_running() and time.time() < deadline, output()
        time.sleep(0.002)


def _fork(
    words: list[str], processes: int, threads: int, outputs: tuple[Path, Path], patches: Mapping[str, str]
) -> list[BaseProcess]:
    ranks = []
    for group in _process_groups(processes):
        environment = environment_with_threads(threads) | group
        ranks.append(_fork_server().Process(target=_run_rank, args=(words, environment, *outputs, dict(patches))))
        ranks[-1].start()
    return ranks


def _fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.build", "eval.run", __name__])
    return context


def _run_forked(words: list[str], processes: int, threads: int, timeout: int) -> CompletedProcess:
    """Run processes forked from a server that has imported everything, which saves ten seconds per process."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = (Path(folder, "stdout"), Path(folder, "stderr"))
        ranks = _fork(words, processes, threads, outputs, {})
        deadline = time.monotonic() + timeout
        running = list(ranks)
        while running and time.monotonic() < deadline:
            wait([process.sentinel for process in running], deadline - time.monotonic())
            running = [process for process in running if process.exitcode is None]
            if any(process.exitcode for process in ranks):  # as torchrun does, end the others
                deadline = min(deadline, time.monotonic() + 5)
        for process in running:
            process.kill()
        for process in ranks:
            process.join()
        status = next((process.exitcode for process in ranks if process.exitcode), 0)
        return CompletedProcess(words, status, *(path.read_text() for path in outputs))


def _process_groups(processes: int) -> list[dict[str, str]]:
    """Return the environment variables by which each process of a group finds the others; one process needs none."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [{**address, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _run_rank(
    words: list[str], environment: dict[str, str], stdout: Path, stderr: Path, patches: Mapping[str, str]
) -> None:
    """Run a script as one process of a group; errors and exit statuses are those of the process."""
    for name, value in patches.items():
        module, _, attribute = name.rpartition(".")
        setattr(importlib.import_module(module), attribute, value)
    multiprocessing.set_start_method(None, force=True)  # workers start as in any process, not from the server
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    _execute(words)


def _reset_accelerate() -> None:
    """Forget Accelerate's settings, which it shares between all accelerators of a process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def environment_with_threads(threads: int) -> dict[str, str]:
    """Return the environment with a number of threads for a process of its own."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


def pretrain(recipe_path: Path, *overrides: object, launch: int | None = None) -> CompletedProcess:
    """Run training/pretrain.py on a recipe; see `run`."""
    return run("training/pretrain.py", "--config", recipe_path, *overrides, launch=launch)
