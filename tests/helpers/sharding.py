"""What processes of a torchrun gather and agree on, written as JSON: `torchrun tests/helpers/sharding.py FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from accelerate import PartialState

from eval.data import TaskData
from eval.models import load_model
from eval.runner import evaluate_task
from eval.sharding import ProcessShard
from eval.tasks import select_tasks
from modeling_amorlip.cli_amorlip import UserError


def count_bytes() -> dict[str, int]:
    """Count the bytes that this process sends from now on."""
    counts = {"sent": 0}
    broadcast, all_gather, gather_objects = dist.broadcast, dist.all_gather, dist.all_gather_object

    def counting_broadcast(tensor, src):
        counts["sent"] += tensor.nbytes if src == dist.get_rank() else 0
        broadcast(tensor, src=src)

    def counting_all_gather(parts, tensor):
        counts["sent"] += tensor.nbytes
        all_gather(parts, tensor)

    def counting_gather_object(parts, item):
        counts["sent"] += len(json.dumps(item))
        gather_objects(parts, item)

    dist.broadcast, dist.all_gather, dist.all_gather_object = (
        counting_broadcast,
        counting_all_gather,
        counting_gather_object,
    )
    return counts


def fail(shard: ProcessShard, where: int, error: Exception) -> str:
    """Return the error that every process gets when one fails."""
    try:
        with shard.agreement():
            if shard.rank == where:
                raise error
    except Exception as caught:
        return f"{type(caught).__name__}: {caught}"
    return "none"


def main(output: str, model: str, tasks: str) -> None:
    state = PartialState(cpu=True)
    shard = ProcessShard(state.process_index, state.num_processes)
    report: dict = {}
    rows = torch.full((3 * shard.rank, 2), float(shard.rank))  # the first process has none
    report["rows"] = shard.gather(rows if shard.rank else torch.zeros(0, 0)).tolist()
    report["labels"] = shard.gather(torch.arange(shard.rank)).tolist()
    report["errors"] = [
        fail(shard, shard.processes - 1, UserError("bad data")),
        fail(shard, 0, ValueError("bug")),
        fail(shard, 99, ValueError("never")),
    ]
    read = TaskData.batches

    def broken(self, batch_size, reader=0, readers=1):
        if self.task.name == "broken" and shard.rank == 1:
            raise RuntimeError("this process alone failed")
        return read(self, batch_size, reader, readers)

    TaskData.batches = broken
    evaluated = load_model(model)
    report["tasks"] = {}
    for task in select_tasks([tasks]):
        counts = count_bytes() if task.name == "large" else {}
        try:
            result = evaluate_task(*evaluated, task, Path(tasks).parent, 64, share=shard, resamples=0)
            report["tasks"][task.name] = result.value
        except Exception as error:
            report["tasks"][task.name] = f"{type(error).__name__}: {error}"
        report["sent"] = counts.get("sent", 0)
    Path(f"{output}.{shard.rank}").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
