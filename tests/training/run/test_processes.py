"""Work that the processes of a run do together."""

import pytest

from tests.helpers.checkout import ROOT, run
from tests.helpers.shards import PLAIN


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
