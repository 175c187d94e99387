"""Train with Transformers' Trainer, with and without gradient checkpointing, and save the weights. Run by
test_capabilities.py:

torchrun --standalone --nproc_per_node 2 tests/helpers/distributed_trainer.py OUTPUT
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from modeling_amorlip import AmorLIPModel
from tests.helpers.towers import TOWERS, collate_pairs, make_config, make_rows, without_dropout


PAIRS, STEPS, LEARNING_RATE = 8, 2, 1e-3
CHECKPOINTING = {"off": None, "reentrant": True, "not reentrant": False}


class OrderedTrainer(Trainer):
    def _get_train_sampler(self, *arguments):
        return SequentialSampler(self.train_dataset)


def make_model(towers: str) -> AmorLIPModel:
    """Make the same model in every process."""
    torch.manual_seed(0)
    return without_dropout(AmorLIPModel(make_config(towers, layers=1))).train()


def train(towers: str, use_reentrant: bool | None, folder: Path) -> dict[str, torch.Tensor]:
    """Return the parameters after some steps of gradient descent."""
    checkpointing = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=PAIRS // 2,
        max_steps=STEPS,
        max_grad_norm=0.0,
        optim="sgd",
        lr_scheduler_type="constant",
        learning_rate=LEARNING_RATE,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        gradient_checkpointing=use_reentrant is not None,
        **(checkpointing if use_reentrant is not None else {}),
    )
    model = make_model(towers)
    trainer = OrderedTrainer(model, arguments, train_dataset=make_rows(PAIRS), data_collator=collate_pairs)
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def main(output: str) -> None:
    torch.set_num_threads(1)
    folder = Path(output).parent
    results = {
        (towers, name): train(towers, use_reentrant, folder)
        for towers in TOWERS
        for name, use_reentrant in CHECKPOINTING.items()
    }
    if torch.distributed.get_rank() == 0:
        torch.save(results, output)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
