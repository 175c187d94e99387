"""The training loop: one step after the other, logged, checkpointed, evaluated."""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from tqdm import tqdm

from eval.errors import UserError
from eval.plots import training_curves
from eval.publish import publish
from eval.run import evaluate, print_table
from eval.tasks import load_task

from .arguments import PretrainArguments, build, unknown_name
from .checkpointing import TrainState, find_checkpoint, load_checkpoint, lock_folder, save_checkpoint
from .data import PairSampler, load_pairs, make_dataloader
from .gradient_cache import cached_backward
from .interruption import Interruption
from .modeling import PairEncoder, build_model
from .objectives import OBJECTIVES, ObjectiveOutput
from .optimization import make_optimizer, set_learning_rates, settle_logit_scale


RESUME = ["--resume_from_checkpoint", "latest"]


class Trainer:
    """Everything a run consists of, and `train()`.

    What is found at the start decides where it begins, in this order:
    1. `resume_from_checkpoint` names a checkpoint, or "latest" finds one: that step, exactly.
    2. "latest" finds a run without a checkpoint: that run from its first step.
    3. `model` names a folder or repository: its weights, step 0.
    4. Otherwise fresh weights, step 0. An output folder that already holds a run is then refused.
    """

    def __init__(self, arguments: PretrainArguments):
        self.arguments = arguments
        self.output_dir = Path(arguments.output_dir)
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
        augmentation = arguments.parsed_augmentation
        self.tasks = [load_task(name) for name in arguments.eval_tasks]

        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # said outright, or several CPU processes do not find each other
            mixed_precision=_precision(arguments.mixed_precision),
            log_with=None if arguments.report_to == "none" else arguments.report_to,
            project_dir=arguments.output_dir,
        )
        set_seed(arguments.seed)
        with self.accelerator.main_process_first():  # one process converts the data, the others read its cache
            pairs = load_pairs(arguments)
        model, self.processor = build_model(
            arguments, pairs[arguments.caption_column], self.output_dir if checkpoint is not None else None
        )
        if arguments.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.model = model
        if arguments.micro_batch_size and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            raise UserError(
                f"micro_batch_size {arguments.micro_batch_size}: this model's batch normalisation would see parts of "
                "the batch, which changes the result. Leave micro_batch_size out, or choose encoders without it."
            )
        image_processor = self.processor.image_processor
        image_size = image_processor.crop_size["height"]
        expected_size = getattr(model.config.vision_config, "image_size", image_size)
        if image_size != expected_size:
            raise UserError(
                f"The processor of {arguments.model} makes images of {image_size} pixels, "
                f"its vision_config.image_size is {expected_size}; make them equal."
            )
        groups = pairs[arguments.group_column] if arguments.group_column else None
        self.sampler = PairSampler(
            len(pairs), arguments.per_device_train_batch_size, self.accelerator.num_processes,
            self.accelerator.process_index, arguments.seed, groups,
        )  # fmt: skip
        self.total_steps = arguments.num_train_epochs * self.sampler.steps_per_epoch
        if arguments.max_steps > 0:
            self.total_steps = min(self.total_steps, arguments.max_steps)
        if arguments.warmup_steps >= self.total_steps:
            raise UserError(
                f"warmup_steps ({arguments.warmup_steps}) is not below the number of steps ({self.total_steps}): "
                "lower it or train longer."
            )
        self.dataloader = make_dataloader(
            pairs, arguments, image_size, self.processor.tokenizer,
            model.config.text_config.max_position_embeddings, self.sampler,
        )  # fmt: skip

        encoder = PairEncoder(model, image_processor.image_mean, image_processor.image_std)
        optimizer = make_optimizer(encoder, arguments)
        self.encoder, self.optimizer = self.accelerator.prepare(encoder, optimizer)
        try:
            self.objective = objective_class(model.config, settings, arguments.negatives, len(pairs))
        except ValueError as error:
            raise UserError(str(error)) from None
        self.objective.to(self.accelerator.device)
        self.accelerator.register_for_checkpointing(self.objective)

        batch_size = self.sampler.global_batch_size
        self.state = TrainState(num_processes=self.accelerator.num_processes, global_batch_size=batch_size)
        if checkpoint is not None:
            self.state = load_checkpoint(self.accelerator, checkpoint, batch_size)
        self.sampler.start_step = self.state.step
        self._announce(len(pairs), checkpoint, augmentation)

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
        with Interruption(self.accelerator) as interruption:
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

    def _run_steps(self, interruption: Interruption) -> None:
        arguments, state, accelerator = self.arguments, self.state, self.accelerator
        self.encoder.train()
        progress = tqdm(
            total=self.total_steps, initial=state.step, unit="step", disable=not accelerator.is_main_process,
            dynamic_ncols=True, mininterval=1,
        )  # fmt: skip
        batches = iter(self.dataloader)
        self._interval_start = time.perf_counter()
        while state.step < self.total_steps:
            epoch, step_in_epoch = divmod(state.step, self.sampler.steps_per_epoch)
            if step_in_epoch == 0:
                self.objective.on_epoch_start(epoch, arguments.num_train_epochs)
            batch = next(batches)
            if isinstance(batch, UserError):
                raise batch
            learning_rate = set_learning_rates(self.optimizer, state.step, self.total_steps, arguments.warmup_steps)
            metrics = self.training_step(batch)
            state.step += 1
            state.samples_seen += self.sampler.global_batch_size
            progress.update()
            at_end, logs = state.step == self.total_steps, state.step % arguments.log_every == 0
            if logs or at_end:
                self._log(metrics, epoch, learning_rate, progress)
            stops = interruption.wanted(waits_anyway=logs)
            if arguments.eval_every and state.step % arguments.eval_every == 0 and not (at_end or stops):
                self._evaluate()
            if state.step % arguments.checkpoint_every == 0 or at_end or stops:
                save_checkpoint(accelerator, self.output_dir, state, arguments.keep_last, arguments.keep_every)
            if stops:
                break
        progress.close()

    def training_step(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One optimiser step on this process's batch; returns detached scalars, still on the device."""
        arguments, accelerator = self.arguments, self.accelerator
        batch = {key: value.to(accelerator.device, non_blocking=True) for key, value in batch.items()}
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
        if arguments.max_grad_norm:
            parameters = [p for p in self.encoder.parameters() if p.requires_grad]
            metrics["grad_norm"] = accelerator.clip_grad_norm_(parameters, arguments.max_grad_norm)
        scale_parameter = self.model.logit_scale
        before = scale_parameter.detach().clone()
        self.optimizer.step()
        self.optimizer.zero_grad()
        settle_logit_scale(scale_parameter, before, arguments.logit_scale_slow_above, arguments.max_logit_scale)
        return metrics

    def _loss(self, *inputs: torch.Tensor | None) -> ObjectiveOutput:
        """The objective, in mixed precision: `prepare` sees to the encoders only."""
        with self.accelerator.autocast():
            return self.objective(*inputs)

    # -- saving and evaluating -----------------------------------------------------------------------------------------

    def save_model(self) -> None:
        """Model, processor and tokenizer at the root of `output_dir`, as `AutoModel.from_pretrained` reads them."""
        if self.objective.amortizer is not None:
            self.model.amortizer.load_state_dict(self.objective.amortizer.state_dict())
        if self.accelerator.is_main_process:
            self.model.save_pretrained(self.output_dir)
        self.accelerator.wait_for_everyone()

    def _evaluate(self, final: bool = False) -> None:
        """Runs `eval_tasks`; after the last step also draws the curves, and a contact sheet a task."""
        if self.accelerator.is_main_process:
            results = []
            for task in self.tasks:
                sheet = self.output_dir / f"{task.name}.png" if final else None
                results += evaluate(self.model, self.processor, task, sheet=sheet)
            if results:
                _append_line(self.output_dir / "eval.jsonl", {"step": self.state.step, "results": results})
                print_table(results)
            if final:
                log = {self.arguments.objective: self.output_dir / "metrics.jsonl"}
                training_curves(log, self.output_dir / "training_curves.png")
        self.encoder.train()
        self.accelerator.wait_for_everyone()

    # -- what is written and printed -----------------------------------------------------------------------------------

    def _open_logs(self) -> None:
        if self.arguments.report_to != "none":
            self.accelerator.init_trackers("amorlip", config=_flat(dataclasses.asdict(self.arguments)))
        if not self.accelerator.is_main_process:
            return
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.output_dir)  # held as long as the trainer lives
        except OSError as error:
            raise UserError(f"output_dir {self.output_dir} cannot be written: {error.strerror}.") from None
        config = {"arguments": dataclasses.asdict(self.arguments), "versions": _versions()}
        self.processor.save_pretrained(self.output_dir)  # a resumed run reads its tokenizer here
        (self.output_dir / "run_config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        # Lines of steps that a stopped run did after its last checkpoint are done again, so they go.
        for name in ("metrics.jsonl", "eval.jsonl"):
            path = self.output_dir / name
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.state.step]
            path.write_text("".join(kept))

    def _log(self, metrics: dict[str, torch.Tensor], epoch: int, learning_rate: float, progress: tqdm) -> None:
        names, values = list(metrics), torch.stack([m.float() for m in metrics.values()])
        values = self.accelerator.reduce(values, reduction="mean").tolist()
        elapsed = time.perf_counter() - self._interval_start
        steps = self.state.step % self.arguments.log_every or self.arguments.log_every
        self._interval_start = time.perf_counter()
        rate = steps * self.sampler.global_batch_size / elapsed
        logged = {
            "step": self.state.step,
            "epoch": epoch,
            "samples_seen": self.state.samples_seen,
            **dict(zip(names, values, strict=True)),
            "lr": learning_rate,
            "samples_per_second": rate,
        }
        if self.accelerator.is_main_process:
            _append_line(self.output_dir / "metrics.jsonl", logged)
            progress.set_postfix(
                loss=f"{logged['loss']:.4f}", scale=f"{logged['logit_scale']:.1f}", samples_s=f"{rate:.0f}"
            )
        self.accelerator.log(logged, step=self.state.step)

    def _announce(self, num_pairs: int, checkpoint: Path | None, augmentation) -> None:
        arguments, accelerator, model = self.arguments, self.accelerator, self.model
        towers = {"image": model.vision_model, "text": model.text_model, "amortizer": model.amortizer}
        sizes = ", ".join(f"{name} {sum(p.numel() for p in m.parameters()) / 1e6:.2f} M" for name, m in towers.items())
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


def _append_line(path: Path, values: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def _flat(values: dict) -> dict:
    """Trackers take scalars: members of mappings get dotted names, lists become text."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{k}": v for k, v in _flat(value).items()}
        else:
            flat[key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    versions = {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets", "tokenizers")}
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {"python": platform.python_version(), **versions, "git": revision.stdout.strip() or "unknown"}
