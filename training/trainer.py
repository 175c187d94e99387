"""The training loop: take steps, log, checkpoint, evaluate."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from eval.plots import training_curves
from eval.publish import publish
from modeling_amorlip.cli_amorlip import UserError
from training.config import PretrainConfig
from training.data.mixture import Mixture
from training.gradient_cache import cached_backward
from training.model.construction import TrainingModel
from training.model.encoder import EncoderWithObjective
from training.model.whole_models import WholeModels
from training.optimization import (
    clip_gradients,
    constrain_logit_scale_,
    gradient_norms,
    parameter_norms,
    set_learning_rates,
    step_if_finite,
    update_norms,
)
from training.run.announcement import describe_run, make_progress_bar
from training.run.bad_samples import BadSampleLog, merge_bad_samples
from training.run.checkpointing import explain_write_errors, save_checkpoint, set_aside_later_checkpoints
from training.run.flops import FlopMeter
from training.run.loss_spikes import LossSpikeDetector
from training.run.nonfinite import NonFiniteGuard
from training.run.preemption import PreemptionHandler, reset_sigchld_handler, resume_arguments
from training.run.processes import check_shared, explain_lost_processes, run_on_main
from training.run.rescue import StepSnapshot
from training.run.run_logger import RunLogger, flat
from training.run.step_timer import StepTimer
from training.run.train_state import TrainState
from training.run.weights import TrainedWeights
from training.validation import Evaluator, write_model


@dataclass
class Trainer:
    """Run what `training.build.build_trainer` has built.

    Args:
        config: settings of the run.
        accelerator: processes, devices and precision.
        logger: logs in the output folder.
        built: model, processor and adapters.
        module: the encoder and the objective.
        wrapped: `module` as it is wrapped for distribution.
        optimizer: of the encoder.
        weights: what checkpoints hold of module and optimizer.
        models: whole models to save and to evaluate.
        pairs: all pairs, including those held out.
        dataloader: this process's batches, without end.
        evaluator: evaluates the model on held-out pairs and tasks.
        state: where the run stands.
        total_steps: step at which the run is finished.
        flops: counts FLOPs of the encoders.
        checkpoint: the checkpoint that is resumed; None for a run from its first step.
    """

    config: PretrainConfig
    accelerator: Accelerator
    logger: RunLogger
    built: TrainingModel
    module: EncoderWithObjective
    wrapped: nn.Module
    optimizer: AcceleratedOptimizer
    weights: TrainedWeights
    models: WholeModels
    pairs: Mixture
    dataloader: DataLoader
    evaluator: Evaluator
    state: TrainState
    total_steps: int
    flops: FlopMeter
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        config, rank = self.config, self.accelerator.process_index
        self.output_dir = Path(config.output_dir)
        self.model, self.processor = self.built.model, self.built.processor
        self.encoder, self.objective = self.module.encoder, self.module.objective
        self.bad_samples = BadSampleLog(self.logger, config.max_bad_fraction, rank, self.accelerator.num_processes)
        debug, device = self.output_dir / "debug", self.accelerator.device
        self.nonfinite = NonFiniteGuard(config, debug, rank, self.state.skipped_steps, device)
        self.loss_spikes = LossSpikeDetector(self.logger)
        self.timer = StepTimer()
        self._saved_step = self.state.step

    # -- the loop ------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to the last step, then save the model at the root of `output_dir` and evaluate it.

        A signal to stop ends the run after the step in progress, with a checkpoint.

        Raises:
            UserError: the output folder cannot be written, data is lost, or too much of it is bad.
        """
        try:
            self._open_logs()
            self.accelerator.print(describe_run(self))
            self._run_missed_evaluation()
            with PreemptionHandler(self.accelerator) as preemption, explain_lost_processes(self.config.ddp_timeout):
                self._run_steps(preemption)
                if self.state.step < self.total_steps:
                    self.accelerator.print(
                        f"Stopped by {preemption.cause} after step {self.state.step}, which is saved. Continue with:\n"
                        f"accelerate launch {shlex.join(resume_arguments(sys.argv))}"
                    )
            if self.state.step == self.total_steps:
                self._finish()
        finally:
            self.logger.close()
        self.accelerator.end_training()

    def _run_steps(self, preemption: PreemptionHandler) -> None:
        config, state = self.config, self.state
        self.wrapped.train()
        batches, stops = iter(self.dataloader), False
        progress = make_progress_bar(state.step, self.total_steps, self.accelerator.is_main_process)
        reset_sigchld_handler()
        self.timer.restart()
        while state.step < self.total_steps and not stops:
            epoch, is_last = state.epoch, state.step + 1 == self.total_steps
            logs = (state.step + 1) % config.log_every == 0 or is_last
            learning_rate = set_learning_rates(self.optimizer, state.step, self.total_steps, config)
            batch, metrics = self._take_step(batches, logs)
            state.advance()
            self.timer.count_step()
            progress.update()
            if logs:
                self._log(metrics, batch, epoch, learning_rate, progress)
            stops = preemption.should_stop(at_sync_point=logs)
            if state.step % config.checkpoint_every == 0 or is_last or stops:
                self._save_checkpoint()
            # After the checkpoint, so that an evaluation that fails costs no step.
            if self._evaluates_at(state.step) and not stops:
                self.evaluate()
        progress.close()

    def _take_step(self, batches: Iterator[dict[str, Any]], logs: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Train on the next batch, and return it with the step's metrics; save the steps before one that fails.

        Several processes may not meet any more after a failure: they continue from the last checkpoint.
        """
        snapshot = StepSnapshot(self.module) if self.accelerator.num_processes == 1 else None
        try:
            batch = self._next_batch(batches)
            if self.state.at_epoch_start:
                self.module.start_epoch(self.state.epoch, self.config.num_train_epochs)
            return batch, self.training_step(batch, logs)
        except Exception as error:
            if snapshot is not None and self.state.step > self._saved_step and snapshot.restore():
                self.optimizer.zero_grad()
                self._save_checkpoint()
                print(f"Step {self.state.step + 1} failed ({type(error).__name__}); the steps before it are saved.")
            raise

    def _next_batch(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """Return the next batch, and list its unusable pairs.

        Raises:
            UserError: data cannot be read any more, or too many pairs are unusable.
        """
        step = self.state.step + 1
        with self.timer.waiting_for_data():
            try:
                batch = next(batches)
            except (RuntimeError, OSError, EOFError) as error:  # a worker was lost, perhaps while it passed a batch on
                cause = str(error).partition("\n")[0].rstrip(". ") or "A data worker has ended"
                raise UserError(
                    f"Data for step {step} could not be read: {cause}. Continue with --resume_from_checkpoint latest."
                ) from error
            self.bad_samples.record(batch, step)
        return batch

    def training_step(self, batch: dict[str, Any], logs: bool = False) -> dict[str, Tensor]:
        """Take an optimizer step on this process's batch, and return detached scalars, still on the device.

        A step with non-finite gradients changes no parameter and is counted.

        Args:
            batch: what `training.data.collate.Collator` returns, without `bad_samples`.
            logs: whether to include l2 norms of the parameters, of their gradients before clipping and of their
                updates.
        """
        accelerator, size = self.accelerator, self.config.micro_batch_size
        batch = {
            name: value.to(accelerator.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        if size:
            output = cached_backward(accelerator, self.wrapped, self.module, batch, size)
        else:
            output = self.wrapped(**batch)
            accelerator.backward(output.loss)
        metrics = {"loss": output.loss.detach(), **output.metrics}
        if logs:
            metrics |= gradient_norms(self.model)
        trained = [p for p in self.wrapped.parameters() if p.requires_grad]
        metrics["grad_norm"] = clip_gradients(accelerator, self.optimizer, trained, self.config.max_grad_norm)
        skipped = self._update_parameters(metrics["grad_norm"])
        if logs:
            metrics |= parameter_norms(self.model) | update_norms(self.model, self.optimizer.optimizer, skipped)
            metrics["skipped_steps"] = self.nonfinite.skipped
        return metrics

    def _update_parameters(self, grad_norm: Tensor) -> Tensor:
        """Take the optimizer's step unless gradients are not finite; return whether it was skipped, [] of 0 or 1."""
        config, log_scale = self.config, self.model.logit_scale
        previous = log_scale.detach().clone()
        skipped = step_if_finite(self.accelerator, self.optimizer, grad_norm)
        self.nonfinite.count(skipped)
        constrain_logit_scale_(log_scale, previous, config.logit_scale_slow_above, config.max_logit_scale)
        if self.weights.average is not None:
            self.weights.average.update(self.state.step)
        return skipped

    # -- saving --------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        config = self.config
        self.state.skipped_steps = int(self.nonfinite.skipped.item())
        keep = (config.keep_last, config.keep_every)
        with self.timer.paused():
            save_checkpoint(self.accelerator, self.weights, self.output_dir, self.state, self.processor, *keep)
        self._saved_step = self.state.step

    def save_model(self, folder: Path | None = None) -> None:
        """Save model and processor in a folder, `output_dir` by default, for `AutoModel.from_pretrained`.

        With adapters, the merged model is saved, and the adapters in its `adapter/`. The average of the weights, if
        there is one, is saved in `ema/`.

        Raises:
            UserError: the folder cannot be written.
        """
        for name, whole_model in self.models.variants().items():
            with whole_model() as whole:
                if self.accelerator.is_main_process:
                    write_model(whole, (folder or self.output_dir) / name, self.output_dir)
        self.accelerator.wait_for_everyone()

    def _finish(self) -> None:
        """Save and evaluate the finished model, join the logs, and publish."""
        self.save_model()
        self.evaluate(is_final=True)
        if self.accelerator.is_main_process:
            with explain_write_errors("The logs", self.output_dir):
                merge_bad_samples(self.output_dir, self.state.step)
                curves = {self.config.objective: self.output_dir / "metrics.jsonl"}
                training_curves(curves, self.output_dir / "training_curves.png")
            if self.config.push_to_hub:
                print(f"Published   {publish(self.output_dir, self.config.push_to_hub)}")
        self.accelerator.wait_for_everyone()

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def evaluate(self, is_final: bool = False) -> None:
        """Compute the validation loss and evaluate the tasks; keep the best model in `best/`.

        Args:
            is_final: whether to draw contact sheets as well.
        """
        self.evaluator.evaluate(self.models, self.state.step, is_final)
        self.wrapped.train()
        self.accelerator.wait_for_everyone()
        self.timer.restart()

    def _evaluates_at(self, step: int) -> bool:
        """Return whether a step is followed by an evaluation; the last one is followed by the final evaluation."""
        every = self.config.eval_every
        return every > 0 and 0 < step < self.total_steps and step % every == 0

    def _run_missed_evaluation(self) -> None:
        """Evaluate the step that is resumed, if the run was stopped between its checkpoint and its evaluation."""
        step = self.state.step
        if self._evaluates_at(step) and not run_on_main(self.accelerator, lambda: self.evaluator.has_reported(step)):
            self.evaluate()

    # -- logs ----------------------------------------------------------------------------------------------------------

    def _open_logs(self) -> None:
        """Claim the output folder, write the configuration and the processor, and remove logs of later steps.

        Raises:
            UserError: the folder cannot be written, another run uses it, or processes do not share it.
        """
        if self.config.report_to != "none":
            self.accelerator.init_trackers("amorlip", config=flat(dataclasses.asdict(self.config)))
        run_on_main(self.accelerator, self._open_folder)
        check_shared(self.accelerator, self.output_dir / "run_config.yaml")

    def _open_folder(self) -> None:
        self.logger.open(dataclasses.asdict(self.config), self.state.step)
        with explain_write_errors("The processor", self.output_dir):
            set_aside_later_checkpoints(self.output_dir, self.state.step)
            merge_bad_samples(self.output_dir, self.state.step)
            self.processor.save_pretrained(self.output_dir)  # a run that is resumed reads its tokenizer here

    def _log(
        self, metrics: dict[str, Tensor], batch: dict[str, Any], epoch: int, learning_rate: float, progress: tqdm
    ) -> None:
        """Log the metrics of a step, averaged over processes, and stop the run if it cannot go on."""
        names, values = list(metrics), torch.stack([value.float() for value in metrics.values()])
        values = self.accelerator.reduce(values, reduction="mean").tolist()
        interval = self.timer.finish()
        rate = interval.steps * self.state.global_batch_size / interval.seconds
        tokens = batch["input_ids"].numel() if self.config.text_groups == 1 else sum(batch["lengths"])
        logged = {
            "step": self.state.step,
            "epoch": epoch,
            "samples_seen": self.state.samples_seen,
            **dict(zip(names, values, strict=True)),
            "lr": learning_rate,
            "samples_per_second": rate,
            "step_time": interval.seconds_per_step,
            "data_wait": interval.data_wait_fraction,
            **self.flops.rates(len(batch["input_ids"]), tokens, interval.seconds_per_step),
        }
        if self.accelerator.is_main_process:
            if spike := self.loss_spikes.check(logged, batch["sample_ids"]):
                progress.write(spike)
            self.logger.append("metrics", logged)
            progress.set_postfix(
                loss=f"{logged['loss']:.4f}", scale=f"{logged['logit_scale']:.1f}", samples_s=f"{rate:.0f}"
            )
        self.accelerator.log(logged, step=self.state.step)
        self.nonfinite.check(logged, batch)
