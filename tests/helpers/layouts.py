"""Train every objective for five steps in this process layout and save the result. Run by test_layouts.py:

torchrun --standalone --nproc_per_node 2 tests/helpers/layouts.py OUTPUT
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from modeling_amorlip import AmorLIPModel
from tests.helpers.objectives import VARIANTS, make_config
from training.gradient_cache import cached_backward
from training.model.encoder import EncoderWithObjective, PairEncoder
from training.objectives import OBJECTIVES
from training.run.sharded_state import gather_weights
from training.run.sharding import shard_encoder


N, STEPS = 16, 5
MICRO_BATCH_SIZES = {1: (0, 3), 2: (0, 3), 4: (1,)}
"""By number of processes. 0 is the whole batch at once."""
HEADS = [("amorlip", {"amortization": "kl"}, {"head_type": name, "size": 24}) for name in ("prototype", "queue")]
HEADS.append(("amorlip", {"amortization": "js"}, {"head_type": "random_features", "size": 24}))
HEADS.append(("amorlip", {"online_every": 2, "amortization": "conjugate"}, {}))
CASES = [(name, settings, {}) for name, settings in VARIANTS] + HEADS


def compute_in_double_precision() -> None:
    """Make everything that would compute in float32 compute in float64, where layouts differ by 1e-15."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double


def draw_batch(generator: torch.Generator, rows: slice) -> dict[str, torch.Tensor]:
    """Draw a global batch, and return this process's rows of it."""
    batch = {
        "pixel_values": torch.randint(0, 256, (N, 3, 4, 4), generator=generator),
        "input_ids": torch.randint(0, 8, (N, 4), generator=generator),
        "attention_mask": torch.ones(N, 4, dtype=torch.long),
        "sample_ids": torch.randperm(3 * N, generator=generator)[:N],
    }
    return {name: value[rows] for name, value in batch.items()}


def train(accelerator, name, settings, amortizer_config, micro_batch_size, negatives="global", sharding=None):
    """Train an objective for a few steps; return parameters and state, and the bytes that this process holds."""
    torch.manual_seed(0)
    cls = OBJECTIVES[name]
    head = {"head_type": "prototype", "size": 24} if name == "neuclip" else {"size": 24, **amortizer_config}
    config = make_config(**{**cls.model_defaults, "amortizer_config": head})
    model = AmorLIPModel(config)
    objective = cls(config, cls.Arguments(**settings), negatives, num_samples=3 * N)
    module = EncoderWithObjective(PairEncoder(model, [0.5] * 3, [0.5] * 3), objective)
    if sharding is not None:
        shard_encoder(module.encoder, sharding, accelerator.device)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    wrapped, optimizer = accelerator.prepare(module, optimizer) if sharding is None else (module, optimizer)
    share = N // accelerator.num_processes
    rows = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        if step in (0, 3):
            module.start_epoch(step // 3, 4)
        batch = draw_batch(generator, rows)
        if micro_batch_size:
            cached_backward(accelerator, wrapped, module, batch, micro_batch_size)
        else:
            accelerator.backward(wrapped(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    held = [*module.parameters(), *(state["momentum_buffer"] for state in optimizer.state.values())]
    local_bytes = sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in held)
    weights = model.state_dict() if sharding is None else gather_weights(model)
    state = {f"model.{key}": value.clone() for key, value in weights.items()}
    tensors = {key: value for key, value in objective.state_dict().items() if isinstance(value, torch.Tensor)}
    tensors.pop("partition_error", None)  # a metric, kept for logging
    return state | {f"objective.{key}": value.clone() for key, value in tensors.items()}, local_bytes


def count_embedding_collectives(run) -> int:
    """Return how many collectives, apart from DDP's own, carry as much as the embeddings of a process."""
    originals, counted = {}, []
    for collective in ("all_gather", "all_reduce", "broadcast"):
        originals[collective] = getattr(dist, collective)

        def spy(*arguments, _original=originals[collective], **options):
            tensors = [t for a in arguments for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
            counted.extend(t for t in tensors if t.ndim == 2 and t.shape[-1] == 16)
            return _original(*arguments, **options)

        setattr(dist, collective, spy)
    try:
        run()
    finally:
        for collective, original in originals.items():
            setattr(dist, collective, original)
    return len(counted)


def main(output: str) -> None:
    torch.set_num_threads(1)
    compute_in_double_precision()
    accelerator = Accelerator(cpu=True)
    results = {}
    for case in CASES:
        for micro_batch_size in MICRO_BATCH_SIZES[accelerator.num_processes]:
            results[repr((case, bool(micro_batch_size)))] = train(accelerator, *case, micro_batch_size)[0]
    counts = {}
    if accelerator.num_processes == 2:
        for case in CASES:
            name, settings, heads = case
            if name == "neuclip" or heads.get("head_type") in ("prototype", "queue") or "recent_pairs" in settings:
                continue  # they collect embeddings
            for negatives in ("local", "global"):
                counts[repr(case), negatives] = count_embedding_collectives(
                    lambda case=case, negatives=negatives: train(accelerator, *case, 0, negatives)
                )
    if accelerator.is_main_process:
        torch.save({"results": results, "counts": counts}, output)
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
