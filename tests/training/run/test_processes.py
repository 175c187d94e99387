"""Work that the processes of a run do together."""

import pytest
import torch

from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.checkout import ROOT, run
from tests.helpers.shards import PLAIN
from training.run.checkpointing import explain_write_errors
from training.run.processes import explain_lost_processes


SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
sys.argv[-1] = sys.argv[-1].format(os.environ["RANK"])
from training.pretrain import main
sys.exit(main())
"""


@pytest.mark.e2e
@pytest.mark.parametrize("second", ["fewer", "other"])
def test_processes_with_different_data_are_refused(recipe, demo_rows, tmp_path, second):
    demo_rows.select(range(64)).to_parquet(tmp_path / "data0.parquet")
    rows = range(32) if second == "fewer" else range(100, 164)
    demo_rows.select(rows).to_parquet(tmp_path / "data1.parquet")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    options = ["--train_data", tmp_path / "data{}.parquet"]
    result = run(script, "--config", recipe(**PLAIN), *options, launch=2)
    assert result.returncode == 1 and "Processes see different data" in result.stderr


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
        torch.distributed.DistBackendError("NCCL communicator was aborted"),
    ],
)
def test_lost_processes_end_in_one_line(error, tmp_path):
    with (
        pytest.raises(
            UserError, match="could not be reached for 30 seconds .ddp_timeout.*resume_from_checkpoint latest"
        ),
        explain_lost_processes(30),
        explain_write_errors("The checkpoint", tmp_path),
    ):
        raise error


def test_other_errors_are_not_of_lost_processes():
    with pytest.raises(RuntimeError, match="out of memory"), explain_lost_processes(30):
        raise RuntimeError("out of memory")
