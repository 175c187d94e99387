"""Build everything that a run consists of from its configuration, and find everything that can be wrong with it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

from eval.publish import check_repo_id
from eval.tasks import Task, load_task
from modeling_amorlip import AmorLIPConfig
from modeling_amorlip.cli_amorlip import UserError
from modeling_amorlip.pipeline_amorlip import pads_to_context
from training.config import OptimizationConfig, PretrainConfig, build, unknown_name
from training.data.collate import Collator
from training.data.dataset import make_dataloader
from training.data.mixture import Mixture, open_pairs
from training.data.order import ORDER_VERSION, EpochOrder, PairSampler
from training.model.compilation import compile_encoder
from training.model.construction import TrainingModel, build_model
from training.model.encoder import EncoderWithObjective, PairEncoder
from training.model.weight_average import WeightAverage
from training.model.whole_models import WholeModels, copy_without_weights
from training.objectives import OBJECTIVES, ContrastiveObjective
from training.optimizers import make_optimizer
from training.run.checkpointing import load_checkpoint, read_train_state
from training.run.flops import FlopMeter
from training.run.processes import build_accelerator, check_same_data, vary_random_state
from training.run.resume_settings import check_resumed_config, find_resumed
from training.run.run_logger import RunLogger, read_run_config
from training.run.sharding import AutocastModule, ShardingSettings, shard_encoder, take_sharding_settings
from training.run.train_state import TrainState
from training.run.weights import TrainedWeights
from training.trainer import Trainer
from training.validation import Evaluator, check_task_data, held_out, make_validation_loader, task_data_dir


def build_trainer(config: PretrainConfig) -> Trainer:
    """Build a trainer, ready for `train()`.

    Where the run starts is decided in this order:
    1. `resume_from_checkpoint` names a checkpoint, or "latest" finds one: that step, exactly.
    2. "latest" finds a run without a checkpoint: that run, from its first step.
    3. `model` names a folder or repository: its weights, step 0.
    4. Otherwise fresh weights, step 0. An output folder that already holds a run is then refused.

    Raises:
        UserError: something is wrong with the configuration, the data, the model or the output folder.
    """
    # What needs neither data nor devices is checked first.
    checkpoint = find_start(config)
    config, objective_settings = resolve_objective(config)
    check_settings(config, checkpoint)
    tasks = [load_task(name) for name in config.eval_tasks]
    sharding = take_sharding_settings(os.environ)
    accelerator = build_accelerator(config)
    set_seed(config.seed)
    pairs = open_data(config, accelerator, tasks)
    built = build_model(config, accelerator, pairs, checkpoint)
    sampler = build_sampler(config, accelerator, pairs)
    empty = copy_without_weights(built) if sharding and dist.is_initialized() else None
    module = build_module(objective_settings, built, config, accelerator, len(pairs), is_sharded=empty is not None)
    flops = FlopMeter(built.model.to(accelerator.device), built.image_size, built.context, config.patch_dropout)
    wrapped, optimizer = distribute(module, config, accelerator, None if empty is None else sharding)
    vary_random_state(config.seed, accelerator.process_index)
    average = WeightAverage(built.model, config.ema_decay) if config.ema_decay else None
    weights = TrainedWeights(module, optimizer.optimizer, average, empty is not None, tuple(config.optimizer_args))
    dataloader, validation_loader = build_loaders(config, built, pairs, sampler)
    logger = RunLogger(Path(config.output_dir))
    return Trainer(
        config=config,
        accelerator=accelerator,
        logger=logger,
        built=built,
        module=module,
        wrapped=wrapped,
        optimizer=optimizer,
        weights=weights,
        models=WholeModels(built, module, average, empty),
        pairs=pairs,
        dataloader=dataloader,
        evaluator=Evaluator(config, accelerator, logger, tasks, validation_loader),
        total_steps=count_steps(config, sampler.steps_per_epoch, checkpoint),
        state=start_state(config, accelerator, weights, sampler, pairs, checkpoint),
        flops=flops,
        checkpoint=checkpoint,
    )


def distribute(
    module: EncoderWithObjective, config: PretrainConfig, accelerator: Accelerator, sharding: ShardingSettings | None
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """Return the module as it is called in training, and its optimizer.

    Every process holds a whole model, unless there are settings to shard it.

    Raises:
        UserError: the model cannot be sharded as the settings say.
    """
    accelerator.register_for_checkpointing(module.objective)
    if sharding is None:
        return accelerator.prepare(module, make_optimizer(module, config))
    shard_encoder(module.encoder, sharding, accelerator.device)
    optimizer = AcceleratedOptimizer(make_optimizer(module, config), device_placement=False, scaler=accelerator.scaler)
    return AutocastModule(module, accelerator), optimizer


def open_data(config: PretrainConfig, accelerator: Accelerator, tasks: list[Task]) -> Mixture:
    """Open the training pairs, and find the data of the tasks.

    Raises:
        UserError: data is missing, cannot be read, or differs between processes.
    """
    with accelerator.local_main_process_first():  # one process per machine converts data, the others read its cache
        check_task_data(tasks, task_data_dir(config))
        pairs = open_pairs(config)
    check_same_data(accelerator, pairs)
    return pairs


def start_state(
    config: PretrainConfig,
    accelerator: Accelerator,
    weights: TrainedWeights,
    sampler: PairSampler,
    pairs: Mixture,
    checkpoint: Path | None,
) -> TrainState:
    """Return the position of the run, after restoring everything else from its checkpoint, and move the sampler there.

    Raises:
        UserError: the checkpoint does not fit this run.
    """
    state = TrainState(
        num_processes=accelerator.num_processes,
        global_batch_size=sampler.global_batch_size,
        steps_per_epoch=sampler.steps_per_epoch,
        order_version=ORDER_VERSION,
        num_pairs=len(pairs),
        data=pairs.fingerprint(),
    )
    if checkpoint is not None:
        saved = read_train_state(checkpoint)
        if "train_data" not in config.override:
            change = ""
            if saved.num_pairs not in (0, len(pairs)):
                change = f"has {len(pairs)} pairs, and had {saved.num_pairs} when {checkpoint} was written"
            elif saved.data not in ("", state.data):
                change = f"has other pairs than when {checkpoint} was written"
            if change:
                raise UserError(
                    f"train_data {change}, which changes the order of the pairs: restore the data, or allow the change "
                    "with --override train_data."
                )
        state = load_checkpoint(accelerator, weights, checkpoint, state)
        sampler.set_order_version(state.order_version)
    sampler.start_step = state.step
    return state


def build_loaders(
    config: PretrainConfig, built: TrainingModel, pairs: Mixture, sampler: PairSampler
) -> tuple[DataLoader, DataLoader | None]:
    """Return the loader of training batches, and one of the held-out pairs if there are any."""
    multiple = -1 if pads_to_context(built.model.config.text_config) else config.pad_text_to_multiple
    collator = Collator(built.processor.tokenizer, built.context, multiple)
    dataloader = make_dataloader(pairs, config, built.image_size, collator, sampler)
    if not config.validation_samples:
        return dataloader, None
    return dataloader, make_validation_loader(pairs, config, built.image_size, collator)


def find_start(config: PretrainConfig) -> Path | None:
    """Return the checkpoint to resume from, if any.

    Raises:
        UserError: there is no such checkpoint, or the output folder holds another run.
    """
    output_dir = Path(config.output_dir)
    if config.resume_from_checkpoint:
        return find_resumed(output_dir, config.resume_from_checkpoint)
    if output_dir.is_file():
        raise UserError(f"output_dir {output_dir} is a file; name a folder.")
    if (output_dir / "run_config.yaml").exists():
        raise UserError(
            f"output_dir {output_dir} already holds a run, which would be overwritten: "
            "continue it with --resume_from_checkpoint latest, or choose another output_dir."
        )
    return None


def check_settings(config: PretrainConfig, checkpoint: Path | None) -> None:
    """Check the repository to publish to, and a resumed run's settings against those of its first start.

    Raises:
        UserError: the repository's name is wrong, or a setting differs that may not and `override` does not name it.
    """
    if config.push_to_hub:
        check_repo_id(config.push_to_hub)
    if checkpoint is not None and (checkpoint.parent.parent / "run_config.yaml").is_file():
        settings = read_run_config(checkpoint.parent.parent)
        del settings["versions"]
        check_resumed_config(build(PretrainConfig, settings), config)


def resolve_objective(config: PretrainConfig) -> tuple[PretrainConfig, Any]:
    """Return the configuration with the objective's defaults of model fields, and the objective's settings.

    Raises:
        UserError: the objective or one of its settings is unknown or wrong.
    """
    objective_class = OBJECTIVES.get(config.objective)
    if objective_class is None:
        raise UserError(unknown_name("objective", config.objective, list(OBJECTIVES)))
    try:
        settings: Any = build(objective_class.Arguments, config.objective_args, "objective_args.")
    except (TypeError, ValueError) as error:
        raise UserError(f"objective_args: {error}") from None
    defaults = {
        name: value for name, value in objective_class.model_defaults.items() if getattr(config, name) in (None, {})
    }
    return dataclasses.replace(config, **defaults), settings


def build_sampler(config: PretrainConfig, accelerator: Accelerator, pairs: Mixture) -> PairSampler:
    """Return the sampler of this process's share of the batches, without the held-out pairs.

    Raises:
        UserError: no pairs remain for training, or they do not fill a batch.
    """
    groups = pairs.column(config.group_column) if config.group_column else None
    if config.validation_samples >= len(pairs):
        raise UserError(f"validation_samples {config.validation_samples} are not below the {len(pairs)} pairs.")
    order = EpochOrder(pairs, config, held_out(len(pairs), config.validation_samples))
    return PairSampler(
        order,
        len(order),
        config.per_device_train_batch_size,
        accelerator.num_processes,
        accelerator.process_index,
        groups,
    )


def count_steps(config: OptimizationConfig, steps_per_epoch: int, checkpoint: Path | None = None) -> int:
    """Return the number of steps of the run.

    Raises:
        UserError: warmup and final decay leave no steps, or the checkpoint that is resumed has more.
    """
    total_steps = config.num_train_epochs * steps_per_epoch
    if config.max_steps > 0:
        total_steps = min(total_steps, config.max_steps)
    if checkpoint is not None and (step := read_train_state(checkpoint).step) > total_steps:
        raise UserError(
            f"{checkpoint} has taken {step} steps, more than the {total_steps} of the run: raise max_steps or "
            "num_train_epochs, or resume from an earlier checkpoint."
        )
    if config.lr_scheduler_type == "wsd" and config.decay_steps > total_steps - config.warmup_steps:
        raise UserError(
            f"decay_steps ({config.decay_steps}) and warmup_steps ({config.warmup_steps}) are more than the "
            f"{total_steps} steps of the run: lower them or train longer."
        )
    if config.warmup_steps >= total_steps:
        raise UserError(
            f"warmup_steps ({config.warmup_steps}) is not below the number of steps ({total_steps}): "
            "lower it or train longer."
        )
    return total_steps


def build_module(
    objective_settings: Any,
    built: TrainingModel,
    config: PretrainConfig,
    accelerator: Accelerator,
    num_pairs: int,
    is_sharded: bool,
) -> EncoderWithObjective:
    """Return the encoder joined with the objective, as it is wrapped for distribution afterwards.

    Raises:
        UserError: a setting of the encoder or the objective is not possible.
    """
    encoder = build_encoder(built, config, accelerator, is_sharded)
    objective = build_objective(objective_settings, built, config, num_pairs).to(accelerator.device)
    return EncoderWithObjective(encoder, objective)


def build_encoder(
    built: TrainingModel, config: PretrainConfig, accelerator: Accelerator, is_sharded: bool = False
) -> PairEncoder:
    """Return the dual encoder, compiled and laid out as configured.

    Raises:
        UserError: `sync_batchnorm` or `patch_dropout` is not possible.
    """
    encoder = PairEncoder(
        built.model,
        built.processor.image_processor.image_mean,
        built.processor.image_processor.image_std,
        config.freeze,
        config.patch_dropout,
        config.text_groups,
    )
    if config.sync_batchnorm and accelerator.num_processes > 1:
        if accelerator.device.type == "cpu":
            raise UserError("sync_batchnorm needs GPUs: torch cannot join batch statistics on CPUs; leave it out.")
        encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    if config.channels_last:
        encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.compile:
        compile_encoder(encoder, by_layer=is_sharded)
    return encoder


def build_objective(
    settings: Any, built: TrainingModel, config: PretrainConfig, num_samples: int
) -> ContrastiveObjective:
    """Return the objective.

    Raises:
        UserError: its settings contradict the model or the processes.
    """
    model_config = cast(AmorLIPConfig, built.model.config)
    try:
        return OBJECTIVES[config.objective](model_config, settings, config.negatives, num_samples)
    except ValueError as error:
        raise UserError(str(error)) from None
