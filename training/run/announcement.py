"""What a run prints: the lines on what it has detected and chosen, and its progress bar."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tqdm import tqdm


if TYPE_CHECKING:
    from training.trainer import Trainer


def describe_run(trainer: Trainer) -> str:
    """Return lines with devices, precision, objective, model, data and steps of a run."""
    config, accelerator, state = trainer.config, trainer.accelerator, trainer.state
    steps = f"{trainer.total_steps} steps ({trainer.total_steps / state.steps_per_epoch:.1f} epochs)"
    lines = [
        f"Device      {accelerator.device} x {accelerator.num_processes} "
        f"({'found' if torch.cuda.is_available() else 'no GPU found'})",
        *(["Sharding    FSDP2: parameters and optimizer states over all processes"] if trainer.weights.sharded else []),
        f"Objective   {config.objective}, {config.negatives} negatives",
        f"Parameters  {describe_parameters(trainer)}",
        f"Data        {len(trainer.pairs)} pairs of {config.train_data}",
        *(f"Source      {report}" for report in trainer.pairs.report()),
        f"Batch       {state.global_batch_size} = {config.per_device_train_batch_size} "
        f"x {accelerator.num_processes}; {steps}",
        f"Augment     {config.augmentation}",
        f"Start       {f'step {state.step} of {trainer.checkpoint}' if trainer.checkpoint else 'step 0'}",
    ]
    return "\n".join(lines)


def describe_parameters(trainer: Trainer) -> str:
    """Return the number of parameters of each part of the model."""
    model = trainer.model
    parts = {"image": model.vision_model, "text": model.text_model, "amortizer": model.amortizer}
    sizes = ", ".join(f"{name} {sum(p.numel() for p in m.parameters()) / 1e6:.2f} M" for name, m in parts.items())
    if trainer.built.adapted is None:
        return sizes
    trained = sum(p.numel() for p in trainer.module.parameters() if p.requires_grad)
    return f"{sizes}; {trained / 1e6:.3f} M of adapters are trained"


def make_progress_bar(step: int, total_steps: int, is_visible: bool) -> tqdm:
    """Return the progress bar of a run that starts after `step` steps."""
    return tqdm(total=total_steps, initial=step, unit="step", disable=not is_visible, dynamic_ncols=True, mininterval=1)
