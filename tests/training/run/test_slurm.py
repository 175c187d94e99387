"""Steps of srun without another launcher."""

import os

import pytest

from modeling_amorlip.cli_amorlip import UserError
from training.run.slurm import first_host, join_slurm_step


STEP = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
}
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    for name in (*VARIABLES, *STEP):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def set_variables(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_variables


def test_tasks_of_a_step_join(environment):
    environment(**STEP)
    join_slurm_step()
    values = {name: os.environ[name] for name in VARIABLES}
    port = int(values.pop("MASTER_PORT"))
    assert values == {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "gpu003"}
    assert 1024 < port < 65536


@pytest.mark.parametrize(
    "values",
    [
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"},  # the script of sbatch itself
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},
        {**STEP, "RANK": "0", "WORLD_SIZE": "4"},  # srun torchrun
    ],
)
def test_other_processes_are_left_alone(environment, values):
    environment(**values)
    before = dict(os.environ)
    join_slurm_step()
    assert dict(os.environ) == before


def test_own_address_and_missing_variables(environment):
    environment(**STEP, MASTER_ADDR="10.0.0.1", MASTER_PORT="29501")
    join_slurm_step()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "29501")
    del os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["SLURM_STEP_NODELIST"]
    with pytest.raises(UserError, match="srun started 16 processes but did not set SLURM_STEP_NODELIST"):
        join_slurm_step()


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("node7", "node7"),
        ("gpu[003-005,7],cpu1", "gpu003"),
        ("a-1,b-2", "a-1"),
        ("rack[2,5]-eth", "rack2-eth"),
        ("n[12]", "n12"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host
