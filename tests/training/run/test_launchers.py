"""Every launcher, every signal, once and twice, to the launcher alone and to all processes. The table of
docs/training.md is what this test finds:

pytest -m slow tests/training/run/test_launchers.py
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.checkout import ROOT, environment_with_threads
from tests.helpers.runs import assert_same_weights, read_metrics
from training.run.checkpointing import find_damage, list_checkpoints


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
LAUNCHERS = {
    "python": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"],
    "accelerate of two": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
}
FSDP2_CONFIG = ["--config_file", "training/accelerate_configs/fsdp2.yaml", "--mixed_precision", "no"]
SHARDED_LAUNCHERS = {
    "torchrun sharded": (LAUNCHERS["torchrun"], FSDP),
    "accelerate sharded": (["-m", "accelerate.commands.launch", *FSDP2_CONFIG, "--num_processes", "2"], {}),
}
pytestmark = [pytest.mark.slow, pytest.mark.e2e]


def children_of(pid):
    """Return all processes that a process has started, and those that they have."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*children, *(grandchild for child in children for grandchild in children_of(child))]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def start(launcher, path, folder, *options, variables=None):
    """Start a run in the background, and return it once it has logged three steps."""
    process = subprocess.Popen(
        [sys.executable, *launcher, "training/pretrain.py", "--config", path, "--output_dir", folder]
        + list(map(str, options)),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment_with_threads(1) | (variables or {}),
    )
    first = len(read_lines(folder))
    deadline = time.time() + 300
    while len(read_lines(folder)) < first + 3:
        assert process.poll() is None and time.time() < deadline, process.communicate()[0]
        time.sleep(0.01)
    return process


def read_lines(folder):
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().splitlines() if metrics.exists() else []


def wait_until_all_have_ended(process, pids):
    said, _ = process.communicate(timeout=900)
    deadline = time.time() + 120
    while any(map(is_alive, pids)):
        assert time.time() < deadline, "processes did not end"
        time.sleep(0.05)
    return said


@pytest.mark.parametrize("target", ["launcher", "all"])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_signals_end_in_a_checkpoint(recipe, tmp_path, launcher, name, times, target):
    path, folder = recipe(num_train_epochs=4000, per_device_train_batch_size=8), tmp_path / "run"
    process = start(launcher, path, folder)
    started = children_of(process.pid)
    for number in range(times):
        time.sleep(0.3 * number)
        for pid in [process.pid, *(started if target == "all" else [])]:
            if is_alive(pid):
                os.kill(pid, getattr(signal, name))
    said = wait_until_all_have_ended(process, started)
    newest = list_checkpoints(folder)[-1]
    assert find_damage(newest) is None
    assert int(newest.name[5:]) == read_metrics(folder)[-1]["step"], said
    assert "Stopped by" in said and "--resume_from_checkpoint latest" in said, said


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize(
    "launcher, variables, is_sharded",
    [
        *(pytest.param(words, {}, False, id=name) for name, words in LAUNCHERS.items()),
        *(pytest.param(*launch, True, id=name) for name, launch in SHARDED_LAUNCHERS.items()),
    ],
)
def test_runs_stopped_at_random_moments_go_on_exactly(recipe, tmp_path, launcher, variables, is_sharded, name):
    """Stop a run twenty times (STOPS sets another number), and continue each time."""
    stops = int(os.environ.get("STOPS", "20"))
    path = recipe(max_steps=40 * stops, num_train_epochs=4000, checkpoint_every=7, per_device_train_batch_size=8)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    said = wait_until_all_have_ended(start(launcher, path, whole, variables=variables), [])
    assert ("Sharding    FSDP2" in said) == is_sharded, said
    moments = random.Random(stops)
    for number in range(stops):
        resume = ("--resume_from_checkpoint", "latest") if number else ()
        process = start(launcher, path, stopped, *resume, variables=variables)
        started = children_of(process.pid)
        time.sleep(moments.uniform(0, 0.5))
        for pid in (process.pid, *started):
            if is_alive(pid):
                os.kill(pid, getattr(signal, name))
        wait_until_all_have_ended(process, started)
    if not (stopped / "model.safetensors").exists():
        resume = ("--resume_from_checkpoint", "latest")
        wait_until_all_have_ended(start(launcher, path, stopped, *resume, variables=variables), [])
    assert read_metrics(stopped) == read_metrics(whole)
    assert_same_weights(stopped, whole)


@pytest.fixture
def two_hosts():
    """Two network namespaces with a link of their own; the names of their interfaces are `amor0` and `amor1`."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"amor{os.getpid()}a", f"amor{os.getpid()}b"]

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "amor0", "netns", names[0], "type", "veth", "peer", "name", "amor1", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"amor{number}")
            ip("-n", name, "link", "set", f"amor{number}", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr}")
    yield names
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def start_on(host, rank, path, folder, *options):
    """Start the two processes of one host."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2", "--machine_rank", str(rank)]
    launch += ["--num_processes", "4", "--main_process_ip", "10.77.0.1", "--main_process_port", "29511"]
    return subprocess.Popen(
        ["ip", "netns", "exec", host, sys.executable, *launch, "training/pretrain.py", "--config", path]
        + ["--output_dir", folder, *map(str, options)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment_with_threads(1) | {"GLOO_SOCKET_IFNAME": f"amor{rank}"},
    )


def test_two_hosts(two_hosts, recipe, tmp_path):
    """They train as four processes of one host; when the link is cut, they end, and continuing works."""
    path = recipe(max_steps=30, checkpoint_every=5, per_device_train_batch_size=4, augmentation={}, ddp_timeout=30)
    joint, cut = tmp_path / "joint", tmp_path / "cut"
    processes = [start_on(host, rank, path, joint) for rank, host in enumerate(two_hosts)]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    single = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
        + ["training/pretrain.py", "--config", path, "--output_dir", tmp_path / "single"],
        cwd=ROOT,
        env=environment_with_threads(1),
        capture_output=True,
    )
    assert single.returncode == 0
    assert read_metrics(joint) == read_metrics(tmp_path / "single")
    processes = [
        start_on(host, rank, path, cut, "--max_steps", 3000, "--num_train_epochs", 4000)
        for rank, host in enumerate(two_hosts)
    ]
    while len(list_checkpoints(cut)) < 2:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    subprocess.run(["ip", "-n", two_hosts[1], "link", "set", "amor1", "down"], check=True)
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert all(process.returncode != 0 for process in processes)
    assert "error: Another process has ended, or could not be reached for 30 seconds" in said[0], said[0][-3000:]
    subprocess.run(["ip", "-n", two_hosts[1], "link", "set", "amor1", "up"], check=True)
    newest = int(list_checkpoints(cut)[-1].name[5:])
    options = ("--resume_from_checkpoint", "latest", "--max_steps", newest + 5, "--num_train_epochs", 4000)
    processes = [start_on(host, rank, path, cut, *options) for rank, host in enumerate(two_hosts)]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert read_metrics(cut)[-1]["step"] == newest + 5
