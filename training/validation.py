"""Evaluation in training: the contrastive loss of held-out pairs, and tasks of eval/run.py."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from eval.data import find_data
from eval.report import Evaluation, TaskResult, print_table, read_evaluations
from eval.tasks import ROOT, Task
from modeling_amorlip import AmorLIPConfig
from modeling_amorlip.cli_amorlip import UserError
from training.config import AugmentationConfig, PretrainConfig
from training.data.collate import BadSample, Collator
from training.data.dataset import PairDataset
from training.data.mixture import Mixture
from training.model.construction import TrainingModel
from training.model.encoder import EncoderWithObjective, PairEmbeddings, PairEncoder
from training.model.whole_models import WholeModel, WholeModels
from training.objectives.clip import CLIPObjective
from training.run.checkpointing import explain_write_errors
from training.run.run_logger import RunLogger


AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Types to evaluate in, by the precision of training; others evaluate in the model's own."""
VALIDATION_LOG = "bad_validation_samples"
NO_AUGMENTATION = AugmentationConfig(crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0])


def held_out(number_of_pairs: int, validation_samples: int) -> np.ndarray:
    """Return the sorted indices of the pairs that are held out, which are the same for every seed."""
    return np.sort(np.random.default_rng(0).choice(number_of_pairs, validation_samples, replace=False))


def make_validation_loader(pairs: Mixture, config: PretrainConfig, image_size: int, collator: Collator) -> DataLoader:
    """Return a loader of the held-out pairs, without augmentation and without mixing captions and keywords."""
    plain = dataclasses.replace(
        config, augmentation=NO_AUGMENTATION, keywords_column=None, alternative_captions_column=None
    )
    indices = held_out(len(pairs), config.validation_samples)
    return DataLoader(
        PairDataset(pairs, plain, image_size, replacements=indices),
        config.per_device_train_batch_size,
        sampler=[(0, int(index)) for index in indices],
        collate_fn=collator,
        generator=torch.Generator(),  # otherwise iterating draws from the global generator
    )


@torch.no_grad()
def validation_loss(
    accelerator: Accelerator, encoder: PairEncoder, loader: DataLoader, bad_samples: list[BadSample] | None = None
) -> float:
    """Return CLIP's loss over all held-out pairs, whatever the objective of training; every process reads all pairs.

    Args:
        accelerator: provides device and mixed precision.
        encoder: the encoder itself. Encoding through DDP could deadlock where processes have different batches.
        loader: see `make_validation_loader`.
        bad_samples: gets the held-out pairs that could not be used.

    Raises:
        UserError: no held-out pair near an unusable one can be used.
    """
    bad_samples = [] if bad_samples is None else bad_samples
    model_config = cast(AmorLIPConfig, encoder.model.config)
    module = EncoderWithObjective(encoder, CLIPObjective(model_config, None, negatives="local"))
    encoder.eval()
    names = ("pixel_values", "input_ids", "attention_mask")
    with accelerator.autocast():
        batches = []
        for batch in loader:
            bad_samples += batch["bad_samples"]
            if len(batch) == 1:
                last = bad_samples[-1]
                raise UserError(
                    f"Held-out pairs cannot be used; the last one is {last['key']} of {last['shard']}: "
                    f"{last['reason']}. Repair them, or raise validation_samples."
                )
            batches.append(encoder(*(batch[name].to(accelerator.device) for name in names)))
    embeddings = PairEmbeddings(
        torch.cat([batch.image_embeds for batch in batches]),
        torch.cat([batch.text_embeds for batch in batches]),
        batches[0].logit_scale,
        batches[0].logit_bias,
    )
    loss = module.compute_objective(embeddings).loss
    encoder.train()
    return loss.item()


def task_data_dir(config: PretrainConfig) -> Path:
    """Return the folder with the data of evaluation tasks."""
    return Path(config.eval_data_dir) if config.eval_data_dir else ROOT


def check_task_data(tasks: list[Task], data_dir: Path) -> None:
    """Find the data of all tasks, so that missing data is reported before training.

    Raises:
        UserError: the data of a task is missing or incomplete.
    """
    for task in tasks:
        find_data(task, data_dir)


def write_model(whole: WholeModel, folder: Path, output_dir: Path) -> None:
    """Save a model and its processor in a folder.

    Raises:
        UserError: the folder cannot be written.
    """
    with explain_write_errors("The model", output_dir):
        whole.built.save(folder)


@dataclass
class Evaluator:
    """Evaluate a model while it is trained.

    Args:
        config: settings of the run.
        accelerator: processes, devices and precision.
        logger: logs of the run; `eval` holds the evaluations.
        tasks: evaluation tasks; the main metric of the first one decides which model is the best.
        validation_loader: the held-out pairs; None without any.
    """

    config: PretrainConfig
    accelerator: Accelerator
    logger: RunLogger
    tasks: list[Task]
    validation_loader: DataLoader | None

    def evaluate(self, models: WholeModels, step: int, is_final: bool = False) -> None:
        """Evaluate the model and the average of its weights; report it, and keep the best model in `best/`.

        All processes take part, in the precision of training.

        Args:
            models: the model and its average.
            step: steps that the model has been trained for.
            is_final: whether to draw a contact sheet per task as well.
        """
        output_dir, is_main = Path(self.config.output_dir), self.accelerator.is_main_process
        evaluations = {}
        for name, whole_model in models.variants().items():
            with whole_model() as whole, explain_write_errors("Contact sheets", output_dir, errors=(OSError,)):
                sheet_folder = output_dir if is_final and not name else None
                evaluations[name] = self._evaluate_model(whole, step, sheet_folder)
                if is_main and not name and self.is_best(evaluations[name]):
                    write_model(whole, output_dir / "best", output_dir)
        if is_main:
            self.report(evaluations[""], evaluations.get("ema"))

    def _evaluate_model(self, whole: WholeModel, step: int, sheet_folder: Path | None) -> Evaluation:
        """Compute the validation loss and evaluate the tasks; draw a contact sheet per task in the folder, if any."""
        evaluation = Evaluation(step, results=[])
        if self.validation_loader is not None:
            bad_samples: list[BadSample] = []
            evaluation.validation_loss = validation_loss(
                self.accelerator, whole.encoder, self.validation_loader, bad_samples
            )
            self._list_bad_samples(bad_samples, step)
        evaluation.results = [self._evaluate_task(whole.built, task, sheet_folder) for task in self.tasks]
        return evaluation

    def _list_bad_samples(self, bad_samples: list[BadSample], step: int) -> None:
        """List the held-out pairs that could not be used, once per run: they are the same at every evaluation."""
        if bad_samples and not self.logger.lines(VALIDATION_LOG) and self.accelerator.is_main_process:
            print(f"{len(bad_samples)} held-out pairs could not be used; they are listed in {VALIDATION_LOG}.jsonl.")
            for entry in bad_samples:
                self.logger.append(VALIDATION_LOG, {"step": step, **entry})

    def _evaluate_task(self, built: TrainingModel, task: Task, sheet_folder: Path | None) -> TaskResult:
        # Here, so that training without tasks need not wait for `evaluate`.
        from eval.runner import EvaluationOptions, ProcessShard, evaluate_task

        return evaluate_task(
            built.model,
            built.processor,
            task,
            task_data_dir(self.config),
            share=ProcessShard(self.accelerator.process_index, self.accelerator.num_processes),
            sheet=sheet_folder / f"{task.name}.png" if sheet_folder else None,
            resamples=0,
            options=EvaluationOptions(dtype=AUTOCAST_DTYPES.get(self.accelerator.mixed_precision)),
        )

    def is_best(self, evaluation: Evaluation) -> bool:
        """Return whether a run with `eval_every` has not reported so high a main metric before."""
        if not self.config.eval_every or not evaluation.results:
            return False
        earlier = [line.results[0].value for line in self._reported() if line.results]
        return all(evaluation.results[0].value > value for value in earlier)

    def report(self, evaluation: Evaluation, averaged: Evaluation | None = None) -> None:
        """Print an evaluation and add it to the log, if there was something to evaluate.

        Args:
            evaluation: of the trained weights.
            averaged: of their average, which the line holds under `ema`.
        """
        line: dict[str, Any] = {"step": evaluation.step, **_describe(evaluation)}
        if averaged is not None:
            line["ema"] = _describe(averaged, "average of the weights, ")
        if evaluation.results or evaluation.validation_loss is not None:
            self.logger.append("eval", line)

    def has_reported(self, step: int) -> bool:
        """Return whether the log holds an evaluation of a step."""
        return any(line.step == step for line in self._reported())

    def _reported(self) -> list[Evaluation]:
        path = self.logger.folder / "eval.jsonl"
        return read_evaluations(path) if path.exists() else []


def _describe(evaluation: Evaluation, title: str = "") -> dict[str, Any]:
    """Print an evaluation, and return it for the log."""
    line: dict[str, Any] = {}
    if evaluation.validation_loss is not None:
        print(f"{title}validation loss {evaluation.validation_loss:.4f} at step {evaluation.step}")
        line["validation_loss"] = evaluation.validation_loss
    if title and evaluation.results:
        print(f"{title}step {evaluation.step}")
    if evaluation.results or line:
        print_table(evaluation.results)
    return line | {"results": [result.to_dict() for result in evaluation.results]}
