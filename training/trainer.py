"""The training loop: one step after the other, logged, checkpointed, evaluated."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch import nn
from tqdm import tqdm

from eval.plots import training_curves
from eval.publish import publish
from eval.report import print_table
from eval.runner import ProcessShard, evaluate
from eval.tasks import load_task
from modeling_amorlip.cli_amorlip import UserError
from training.build import build_model
from training.config import PretrainConfig, build, unknown_name
from training.data.collate import Collator
from training.data.dataset import make_dataloader
from training.data.mixture import open_pairs
from training.data.order import EpochOrder, PairSampler
from training.gradient_cache import cached_backward
from training.model.encoder import PairEncoder
from training.model.lora import add_adapters, save_adapted
from training.objectives import OBJECTIVES, ObjectiveOutput
from training.optimization import (
    constrain_logit_scale_,
    make_optimizer,
    norms_by_group,
    set_learning_rates,
    skip_if_not_finite,
)
from training.run.checkpointing import TrainState, find_checkpoint, load_checkpoint, save_checkpoint
from training.run.flops import FlopMeter
from training.run.guards import Guards
from training.run.preemption import PreemptionHandler, reset_sigchld_handler
from training.run.run_logger import RunLogger, flat
from training.validation import held_out, validation_loss


RESUME = ["--resume_from_checkpoint", "latest"]


class Trainer:
    """Everything a run consists of, and `train()`.

    What is found at the start decides where it begins, in this order:
    1. `resume_from_checkpoint` names a checkpoint, or "latest" finds one: that step, exactly.
    2. "latest" finds a run without a checkpoint: that run from its first step.
    3. `model` names a folder or repository: its weights, step 0.
    4. Otherwise fresh weights, step 0. An output folder that already holds a run is then refused.
    """

    def __init__(self, arguments: PretrainConfig):
        self.arguments = arguments
        self.output_dir = Path(arguments.output_dir)
        self.logbook = RunLogger(self.output_dir)
        checkpoint = self._find_start()
        objective_class = OBJECTIVES.get(arguments.objective)
        if objective_class is None:
            raise UserError(unknown_name("objective", arguments.objective, list(OBJECTIVES)))
        try:
            settings = build(objective_class.Arguments, arguments.objective_args, "objective_args.")
        except (TypeError, ValueError) as error:
            raise UserError(f"objective_args: {error}") from None
        for name, value in objective_class.model_defaults.items():
            if getattr(arguments, name) in (None, {}):
                setattr(arguments, name, value)
        augmentation, lora = arguments.augmentation, arguments.lora
        self.tasks = [load_task(name) for name in arguments.eval_tasks]

        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # said outright, or several CPU processes do not find each other
            mixed_precision=_precision(arguments.mixed_precision),
            log_with=None if arguments.report_to == "none" else arguments.report_to,
            project_dir=arguments.output_dir,
        )
        kind = self.accelerator.distributed_type
        if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
            raise UserError(
                f"Accelerate is set up for {kind.value}; here every process has a whole model (MULTI_GPU, see "
                "training/accelerate_configs/). gradient_checkpointing and micro_batch_size save memory."
            )
        set_seed(arguments.seed)
        with self.accelerator.main_process_first():  # one process converts the data, the others read its cache
            self.pairs = pairs = open_pairs(arguments)
        model, self.processor = build_model(
            arguments, pairs.captions(), self.output_dir if checkpoint is not None else None
        )
        self.adapted = add_adapters(model, lora, arguments.freeze) if lora else None
        if arguments.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.model = model
        if arguments.micro_batch_size and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            raise UserError(
                f"micro_batch_size {arguments.micro_batch_size}: this model's batch normalisation would see parts of "
                "the batch, which changes the result. Leave micro_batch_size out, or choose encoders without it."
            )
        image_processor = self.processor.image_processor
        shape = dict(getattr(image_processor, "crop_size", None) or image_processor.size)
        self.image_size = image_size = shape.get("height", shape.get("shortest_edge"))
        expected_size = getattr(model.config.vision_config, "image_size", image_size)
        if image_size != expected_size:
            raise UserError(
                f"The processor of {arguments.model} makes images of {image_size} pixels, "
                f"its vision_config.image_size is {expected_size}; make them equal."
            )
        groups = pairs.column(arguments.group_column) if arguments.group_column else None
        if arguments.validation_samples >= len(pairs):
            raise UserError(f"validation_samples {arguments.validation_samples} are not below the {len(pairs)} pairs.")
        order = EpochOrder(pairs, arguments, held_out(len(pairs), arguments.validation_samples))
        self.sampler = PairSampler(
            order,
            len(order),
            arguments.per_device_train_batch_size,
            self.accelerator.num_processes,
            self.accelerator.process_index,
            groups,
        )
        self.total_steps = arguments.num_train_epochs * self.sampler.steps_per_epoch
        if arguments.max_steps > 0:
            self.total_steps = min(self.total_steps, arguments.max_steps)
        if arguments.warmup_steps >= self.total_steps:
            raise UserError(
                f"warmup_steps ({arguments.warmup_steps}) is not below the number of steps ({self.total_steps}): "
                "lower it or train longer."
            )
        context = model.config.text_config.max_position_embeddings
        self.collator = Collator(self.processor.tokenizer, context, arguments.pad_text_to_multiple)
        self.dataloader = make_dataloader(pairs, arguments, image_size, self.collator, self.sampler)

        encoder = PairEncoder(
            model,
            image_processor.image_mean,
            image_processor.image_std,
            arguments.freeze,
            arguments.patch_dropout,
            arguments.text_groups,
        )
        if arguments.sync_batchnorm and self.accelerator.num_processes > 1:
            if self.accelerator.device.type == "cpu":
                raise UserError("sync_batchnorm needs GPUs: torch cannot join batch statistics on CPUs; leave it out.")
            encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
        if arguments.channels_last:
            encoder.to(memory_format=torch.channels_last)
        if arguments.compile:
            encoder.compile()
        optimizer = make_optimizer(encoder, arguments)
        self.encoder, self.optimizer = self.accelerator.prepare(encoder, optimizer)
        try:
            self.objective = objective_class(model.config, settings, arguments.negatives, len(pairs))
        except ValueError as error:
            raise UserError(str(error)) from None
        self.objective.to(self.accelerator.device)
        self.accelerator.register_for_checkpointing(self.objective)

        batch_size = self.sampler.global_batch_size
        self.state = TrainState(
            num_processes=self.accelerator.num_processes, global_batch_size=batch_size, order_version=order.version
        )
        if checkpoint is not None:
            self.state = load_checkpoint(self.accelerator, checkpoint, batch_size)
            self.sampler.order = EpochOrder(pairs, arguments, order.excluded, self.state.order_version)
        self.sampler.start_step = self.state.step
        self.guards = Guards(
            arguments, self.logbook, self.accelerator.process_index, self.state.skipped_steps, self.accelerator.device
        )
        self.flops = FlopMeter(model, image_size, context, arguments.patch_dropout)
        self._announce(len(pairs), checkpoint, augmentation)
        for part in pairs.parts:
            for shard, damage in getattr(part, "damage", {}).items():
                self.accelerator.print(f"Damaged     {shard}: {damage}; its whole pairs are used")

    def _find_start(self) -> Path | None:
        arguments = self.arguments
        if arguments.resume_from_checkpoint:
            return find_checkpoint(self.output_dir, arguments.resume_from_checkpoint)
        if self.output_dir.is_file():
            raise UserError(f"output_dir {self.output_dir} is a file; name a folder.")
        if (self.output_dir / "run_config.yaml").exists():
            raise UserError(
                f"output_dir {self.output_dir} already holds a run, which would be overwritten: "
                "continue it with --resume_from_checkpoint latest, or choose another output_dir."
            )
        return None

    # -- the loop ------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Runs to the last step, then saves the model at the root of `output_dir` and evaluates it.

        A signal to stop ends it after the step in progress, with a checkpoint.
        """
        self._open_logs()
        with PreemptionHandler(self.accelerator) as interruption:
            self._run_steps(interruption)
        if self.state.step == self.total_steps:
            self.save_model()
            self._evaluate(final=True)
            if self.arguments.push_to_hub and self.accelerator.is_main_process:
                print(f"Published   {publish(self.output_dir, self.arguments.push_to_hub)}")
        else:
            again = sys.argv if "--resume_from_checkpoint" in sys.argv else [*sys.argv, *RESUME]
            self.accelerator.print(
                f"Stopped by {interruption.name} after step {self.state.step}, which is saved. Go on with:\n"
                f"accelerate launch {shlex.join(again)}"
            )
        self.accelerator.end_training()

    def _run_steps(self, interruption: PreemptionHandler) -> None:
        arguments, state, accelerator = self.arguments, self.state, self.accelerator
        self.encoder.train()
        progress = tqdm(
            total=self.total_steps,
            initial=state.step,
            unit="step",
            disable=not accelerator.is_main_process,
            dynamic_ncols=True,
            mininterval=1,
        )
        batches = iter(self.dataloader)
        reset_sigchld_handler()
        self._begin_interval()
        while state.step < self.total_steps:
            epoch, step_in_epoch = divmod(state.step, self.sampler.steps_per_epoch)
            if step_in_epoch == 0:
                self.objective.on_epoch_start(epoch, arguments.num_train_epochs)
            learning_rate = set_learning_rates(self.optimizer, state.step, self.total_steps, arguments.warmup_steps)
            logs = (state.step + 1) % arguments.log_every == 0 or state.step + 1 == self.total_steps
            try:
                batch = self._next(batches)
                metrics = self.training_step(batch, logs)
            except Exception as error:
                self._rescue(error)
                raise
            state.step += 1
            self._interval_steps += 1
            state.samples_seen += self.sampler.global_batch_size
            progress.update()
            at_end = state.step == self.total_steps
            if logs:
                self._log(metrics, batch, epoch, learning_rate, progress)
            stops = interruption.should_stop(waits_anyway=logs)
            if arguments.eval_every and state.step % arguments.eval_every == 0 and not (at_end or stops):
                self._evaluate()
            if state.step % arguments.checkpoint_every == 0 or at_end or stops:
                self._save_checkpoint()
            if stops:
                break
        progress.close()

    def _next(self, batches) -> dict[str, torch.Tensor]:
        """The next batch, with its unusable pairs listed; raises `UserError` when data cannot be read on."""
        start = time.perf_counter()
        try:
            batch = next(batches)
        except (RuntimeError, OSError) as error:  # a worker was lost
            raise UserError(
                f"Data for step {self.state.step + 1} could not be read: {str(error).splitlines()[0]} "
                "Go on with --resume_from_checkpoint latest."
            ) from error
        self.guards.list_bad_samples(batch, self.state.step + 1)
        self._data_wait += time.perf_counter() - start
        return batch

    def _begin_interval(self) -> None:
        """Starts the clock of the next logged line, which evaluation and checkpoints are not part of."""
        self._interval_start, self._interval_steps, self._data_wait = time.perf_counter(), 0, 0.0

    def _rescue(self, error: Exception) -> None:
        """Saves the steps before one that failed.

        Not with several processes, which may not meet any more, nor in an epoch's first step, before which objectives
        have begun the epoch: those go on from the last checkpoint.
        """
        if self.accelerator.num_processes == 1 and self.state.step % self.sampler.steps_per_epoch:
            self.optimizer.zero_grad()
            self._save_checkpoint()
            print(f"Step {self.state.step + 1} failed ({type(error).__name__}); those before it are saved.")

    def training_step(self, batch: dict[str, torch.Tensor], logs: bool = False) -> dict[str, torch.Tensor]:
        """One optimiser step on this process's batch; returns detached scalars, still on the device.

        A step with gradients that are not finite changes no parameter and is counted. `logs` adds l2 norms of each
        group of parameters, of gradients before they are clipped.
        """
        arguments, accelerator = self.arguments, self.accelerator
        batch = {
            key: value.to(accelerator.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
        }
        sample_ids = batch.pop("sample_ids")
        if arguments.micro_batch_size:
            output, logit_scale = cached_backward(
                accelerator, self.encoder, self._loss, batch, sample_ids, arguments.micro_batch_size
            )
        else:
            image_embeds, text_embeds, logit_scale, logit_bias = self.encoder(**batch)
            output = self._loss(image_embeds, text_embeds, logit_scale, logit_bias, sample_ids)
            accelerator.backward(output.loss)
        metrics = {"loss": output.loss.detach(), **output.metrics, "logit_scale": logit_scale.detach()}
        if logs:
            metrics |= norms_by_group(self.model)
        parameters = [p for p in self.encoder.parameters() if p.requires_grad]
        grad_norm = accelerator.clip_grad_norm_(parameters, arguments.max_grad_norm or float("inf"))
        metrics["grad_norm"] = grad_norm
        scale_parameter = self.model.logit_scale
        before = scale_parameter.detach().clone()
        if logs:
            old = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        if accelerator.scaler is None:
            self.guards.count(skip_if_not_finite(self.optimizer.optimizer, grad_norm))
        self.optimizer.step()
        if accelerator.scaler is not None:  # which waits for the device in any case
            self.guards.count(torch.tensor(float(self.optimizer.step_was_skipped), device=accelerator.device))
        self.optimizer.zero_grad()
        if logs:
            metrics |= norms_by_group(self.model, old) | {"skipped_steps": self.guards.skipped}
        constrain_logit_scale_(scale_parameter, before, arguments.logit_scale_slow_above, arguments.max_logit_scale)
        return metrics

    def _loss(self, *inputs: torch.Tensor | None) -> ObjectiveOutput:
        """The objective, in mixed precision: `prepare` sees to the encoders only."""
        image_embeds, text_embeds, *others = inputs
        finite = image_embeds.isfinite().all() & text_embeds.isfinite().all()
        with self.accelerator.autocast():
            # What is not finite must not get into the objective's state, and yet void the step in every process.
            output = self.objective(*(embeds.nan_to_num(0, 0, 0) for embeds in (image_embeds, text_embeds)), *others)
        output.loss = output.loss * torch.where(finite, 1.0, float("nan"))
        return output

    def _save_checkpoint(self) -> None:
        self.state.skipped_steps = int(self.guards.skipped.item())
        arguments = self.arguments
        started = time.perf_counter()
        save_checkpoint(self.accelerator, self.output_dir, self.state, arguments.keep_last, arguments.keep_every)
        self._interval_start += time.perf_counter() - started

    # -- saving and evaluating -----------------------------------------------------------------------------------------

    def save_model(self, folder: Path | None = None) -> None:
        """Model and processor in `output_dir` or another folder, as `AutoModel.from_pretrained` reads them.

        With `lora` it is the merged model, and the adapters lie beside it in `adapter/`.
        """
        if self.objective.amortizer is not None:
            self.model.amortizer.load_state_dict(self.objective.amortizer.state_dict())
        if self.accelerator.is_main_process:
            if self.adapted is None:
                self.model.save_pretrained(folder or self.output_dir)
            else:
                save_adapted(self.adapted, folder or self.output_dir)
            if folder:
                self.processor.save_pretrained(folder)
        self.accelerator.wait_for_everyone()

    def _evaluate(self, final: bool = False) -> None:
        """Validation loss and `eval_tasks`, over all processes; after the last step curves and contact sheets too."""
        if self.objective.amortizer is not None:
            self.model.amortizer.load_state_dict(self.objective.amortizer.state_dict())
        main, line = self.accelerator.is_main_process, {"step": self.state.step}
        if self.arguments.validation_samples:
            line["validation_loss"] = validation_loss(
                self.accelerator, self.encoder, self.pairs, self.arguments, self.image_size, self.collator
            )
        share, results = ProcessShard(self.accelerator.process_index, self.accelerator.num_processes), []
        for task in self.tasks:
            sheet = self.output_dir / f"{task.name}.png" if final else None
            results += evaluate(self.model, self.processor, task, share, sheet)
        if main and (results or len(line) > 1):
            self.logbook.append("eval", line | {"results": results})
            print_table(results)
            if "validation_loss" in line:
                print(f"validation loss {line['validation_loss']:.4f} at step {self.state.step}")
        if results:
            self._keep_best(results)
        if main and final:
            log = {self.arguments.objective: self.output_dir / "metrics.jsonl"}
            training_curves(log, self.output_dir / "training_curves.png")
        self.encoder.train()
        self.accelerator.wait_for_everyone()
        self._begin_interval()

    def _keep_best(self, results: list[dict]) -> None:
        """Saves the model in `best/` when the first task's main metric is higher than ever before."""
        task = self.tasks[0]
        value = next(r["value"] for r in results if (r["task"], r["metric"]) == (task.name, task.main_metric))
        if self.arguments.eval_every and (self.state.best_value is None or value > self.state.best_value):
            self.state.best_value = value
            self.save_model(self.output_dir / "best")

    # -- what is written and printed -----------------------------------------------------------------------------------

    def _open_logs(self) -> None:
        if self.arguments.report_to != "none":
            self.accelerator.init_trackers("amorlip", config=flat(dataclasses.asdict(self.arguments)))
        if not self.accelerator.is_main_process:
            return
        self.logbook.open(dataclasses.asdict(self.arguments), self.state.step)
        self.processor.save_pretrained(self.output_dir)  # a resumed run reads its tokenizer here

    def _log(self, metrics: dict, batch: dict, epoch: int, learning_rate: float, progress: tqdm) -> None:
        names, values = list(metrics), torch.stack([m.float() for m in metrics.values()])
        values = self.accelerator.reduce(values, reduction="mean").tolist()
        elapsed, steps = time.perf_counter() - self._interval_start, self._interval_steps
        waited = self._data_wait
        self._begin_interval()
        rate = steps * self.sampler.global_batch_size / elapsed
        tokens = batch["input_ids"].numel() if self.arguments.text_groups == 1 else sum(batch["lengths"])
        logged = {
            "step": self.state.step,
            "epoch": epoch,
            "samples_seen": self.state.samples_seen,
            **dict(zip(names, values, strict=True)),
            "lr": learning_rate,
            "samples_per_second": rate,
            "step_time": elapsed / steps,
            "data_wait": waited / elapsed,
            **self.flops.rates(len(batch["input_ids"]), tokens, elapsed / steps),
        }
        if self.accelerator.is_main_process:
            if spike := self.guards.spike(logged, batch["sample_ids"]):
                progress.write(spike)
            self.logbook.append("metrics", logged)
            progress.set_postfix(
                loss=f"{logged['loss']:.4f}", scale=f"{logged['logit_scale']:.1f}", samples_s=f"{rate:.0f}"
            )
        self.accelerator.log(logged, step=self.state.step)
        self.guards.check_finite(logged, batch)

    def _announce(self, num_pairs: int, checkpoint: Path | None, augmentation) -> None:
        arguments, accelerator, model = self.arguments, self.accelerator, self.model
        towers = {"image": model.vision_model, "text": model.text_model, "amortizer": model.amortizer}
        sizes = ", ".join(f"{name} {sum(p.numel() for p in m.parameters()) / 1e6:.2f} M" for name, m in towers.items())
        if self.adapted is not None:
            trained = sum(p.numel() for p in self.encoder.parameters() if p.requires_grad)
            sizes += f"; {trained / 1e6:.3f} M of adapters are trained"
        steps = f"{self.total_steps} steps ({self.total_steps / self.sampler.steps_per_epoch:.1f} epochs)"
        accelerator.print(
            f"Device      {accelerator.device} x {accelerator.num_processes} "
            f"({'found' if torch.cuda.is_available() else 'no GPU found'})\n"
            f"Precision   {accelerator.mixed_precision} (mixed_precision {arguments.mixed_precision})\n"
            f"Objective   {arguments.objective}, {arguments.negatives} negatives\n"
            f"Parameters  {sizes}\n"
            f"Data        {num_pairs} pairs of {arguments.train_data}\n"
            f"Batch       {self.sampler.global_batch_size} = {arguments.per_device_train_batch_size} "
            f"x {accelerator.num_processes}; {steps}\n"
            f"Augment     {augmentation}\n"
            f"Start       {f'step {self.state.step} of {checkpoint}' if checkpoint else 'step 0'}"
        )


def _precision(requested: str) -> str:
    if requested == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    return requested
