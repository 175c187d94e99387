"""What a checkpoint holds of the model, its optimizer and the average of its weights, whole or sharded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from training.model.encoder import EncoderWithObjective
from training.model.weight_average import WeightAverage
from training.optimizers import OPTIMIZER_SETTINGS
from training.run.sharded_state import (
    AVERAGE_FOLDER,
    is_sharded,
    load_sharded,
    load_sharded_tensors,
    load_whole,
    save_sharded,
    save_sharded_tensors,
    shard_like,
)


AVERAGE_FILE = "average.safetensors"


@dataclass
class TrainedWeights:
    """The trained module, its optimizer and the average of its weights.

    Args:
        module: the encoder and the objective.
        optimizer: optimizer of the encoder.
        average: moving average of the weights; None without one.
        sharded: whether they are divided among processes; Accelerate saves and loads module and optimizer otherwise.
        settings: options of the optimizer beside the usual ones; those of the run count, not those of a checkpoint.
    """

    module: EncoderWithObjective
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None = None
    sharded: bool = False
    settings: tuple[str, ...] = ()

    def save(self, accelerator: Accelerator, folder: Path) -> None:
        """Write everything to the folder of a checkpoint. All processes must call this."""
        accelerator.save_state(str(folder), safe_serialization=True)
        if self.sharded:
            save_sharded(folder, self.module, self.optimizer)
            if self.average is not None:
                save_sharded_tensors(folder, self.average.tensors)
        elif self.average is not None and accelerator.is_main_process:
            tensors = {name: tensor.contiguous() for name, tensor in self.average.tensors.items()}
            save_file(tensors, folder / AVERAGE_FILE)

    def load(self, accelerator: Accelerator, folder: Path) -> None:
        """Restore everything from the folder of a checkpoint, whether it is sharded as this run is or not.

        Raises:
            ValueError: the checkpoint is of another optimizer.
        """
        fresh = [{key: value for key, value in g.items() if key != "params"} for g in self.optimizer.param_groups]
        is_whole = not self.sharded and not is_sharded(folder)
        with contextlib.nullcontext() if is_whole else without_model_and_optimizer(accelerator):
            accelerator.load_state(str(folder))
        if is_sharded(folder):
            load_sharded(folder, self.module, self.optimizer)
        elif self.sharded:
            load_whole(folder, self.module, self.optimizer)
        for group, values in zip(self.optimizer.param_groups, fresh, strict=True):
            if missing := values.keys() - group.keys():
                raise ValueError(f"its optimizer has no {', '.join(sorted(missing))}")
            group.update((key, values[key]) for key in (*OPTIMIZER_SETTINGS, *self.settings) if key in values)
        if self.average is not None:
            self._load_average(self.average, folder)

    @staticmethod
    @torch.no_grad()
    def _load_average(average: WeightAverage, folder: Path) -> None:
        if (folder / AVERAGE_FOLDER).is_dir():
            load_sharded_tensors(folder, average.tensors)
        elif (folder / AVERAGE_FILE).is_file():
            for name, value in load_file(folder / AVERAGE_FILE).items():
                average.tensors[name].copy_(shard_like(value, average.tensors[name]))
        else:
            average.restart()


@contextlib.contextmanager
def without_model_and_optimizer(accelerator: Accelerator) -> Iterator[None]:
    """Make Accelerate load the other states alone."""
    models, optimizers = accelerator._models, accelerator._optimizers
    accelerator._models, accelerator._optimizers = [], []
    try:
        yield
    finally:
        accelerator._models, accelerator._optimizers = models, optimizers
