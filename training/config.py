"""Typed, validated configuration of a training run, read from a YAML recipe and the command line.

    accelerate launch training/pretrain.py --config training/recipes/emoji_demo.yaml --learning_rate 5e-4

Every field below can be set in the recipe and on the command line, which wins. A dot reaches a member of a mapping, as
in `--augmentation.rotation 15` or `--vision_config.hidden_size 192`; `--vision_config '{...}'` replaces the mapping.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from training.config_fields import check_fields, expand_home, setting, user_error
from training.config_reader import build, format_help, read_settings, unknown_name


__all__ = [
    "AugmentationConfig",
    "DataConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizationConfig",
    "PretrainConfig",
    "RunConfig",
    "build",
    "parse_config",
    "print_help_and_exit",
    "unknown_name",
]

DESCRIPTION = """Train AmorLIP, or another objective, from a recipe.

Every setting below can stand in the recipe, as `name: value`, and on the command line, which wins. A dot reaches a
member of a mapping, as in --augmentation.rotation 15 or --vision_config.hidden_size 192; --vision_config '{...}'
replaces the mapping. Lists are written [a, b], or a b on the command line; null unsets a setting."""
USAGE = "accelerate launch training/pretrain.py --config RECIPE [--field value ...]"


@dataclass
class AugmentationConfig:
    """Random changes to training images. The defaults are the paper's: a slight crop and nothing else."""

    crop_scale: list[float] = setting([0.9, 1.0], "Range of the crop's area, as a fraction of the image's.", gt=0, le=1)
    crop_ratio: list[float] = setting([0.75, 4 / 3], "Range of the crop's width divided by its height.", gt=0)
    horizontal_flip: float = setting(0.0, "Probability of mirroring the image left to right.", ge=0, le=1)
    rotation: float = setting(0.0, "Largest rotation to either side, in degrees.", ge=0, le=180)
    translation: float = setting(0.0, "Largest shift, as a fraction of the image's side.", ge=0, le=1)
    zoom: list[float] = setting(
        [1.0, 1.0], "Range of magnification; values below 1 continue the border around the image.", gt=0
    )
    color_jitter: float = setting(
        0.0, "Largest change of brightness, contrast and saturation, as a fraction.", ge=0, le=1
    )
    restyle: float = setting(0.0, "Probability of changing tones, colors, sharpness or outlines.", ge=0, le=1)

    def __post_init__(self) -> None:
        check_fields(self, "augmentation.")
        for name in ("crop_scale", "crop_ratio", "zoom"):
            value = getattr(self, name)
            if len(value) != 2 or value[0] > value[1]:
                raise user_error(f"augmentation.{name} must be [low, high] with low <= high, got {value}.")


@dataclass
class LoraConfig:
    """Low-rank adapters (LoRA) to train in place of the encoders; there are none unless one of these is set."""

    rank: int = setting(8, "Rank of the adapters' matrices.", ge=1)
    alpha: float = setting(16.0, "Scale of the adapters' output, which is multiplied by alpha / rank.", gt=0)
    dropout: float = setting(0.0, "Probability of dropping an element of an adapter's input in training.", ge=0, lt=1)
    target_modules: list[str] = setting(
        ["q_proj", "v_proj"], "Names of the layers that are adapted; the default is CLIP's attention."
    )

    def __post_init__(self) -> None:
        check_fields(self, "lora.")
        if not self.target_modules:
            raise user_error("lora.target_modules is empty: name layers to adapt, such as q_proj.")


@dataclass
class RunConfig:
    """Where the run writes, and how often it saves, logs and evaluates."""

    output_dir: str = setting("", "Folder for the model, checkpoints and metrics.", is_path=True, required=True)
    resume_from_checkpoint: str | None = setting(
        None, "Checkpoint to continue from: 'latest', or a folder checkpoints/step_XXXXXXXX.", is_path=True
    )
    override: list[str] = setting([], "Names of settings that may differ from the run that is resumed.")
    checkpoint_every: int = setting(1000, "Steps between checkpoints.", ge=1)
    keep_last: int = setting(2, "Number of newest checkpoints to keep.", ge=1)
    keep_every: int = setting(
        0, "Keep checkpoints whose step is a multiple of this number of steps; 0 keeps the newest only.", ge=0
    )
    log_every: int = setting(10, "Steps between lines of metrics.jsonl.", ge=1)
    eval_every: int = setting(0, "Steps between evaluations; 0 evaluates after the last step only.", ge=0)
    eval_data_dir: str | None = setting(
        None, "Folder with the data of eval_tasks; by default the repository's root.", is_path=True
    )
    eval_tasks: list[str] = setting(
        [], "Tasks of eval/run.py to evaluate; best/ keeps the model with the highest score on the first."
    )
    validation_samples: int = setting(
        0, "Number of pairs held out from training; evaluations report their contrastive loss.", ge=0
    )
    push_to_hub: str | None = setting(None, "Hub repository USER/NAME that the finished model is published to.")
    report_to: str = setting("none", "Experiment tracker that Accelerate logs to, such as tensorboard, or none.")
    debug_pixels: bool = setting(
        False, "Save the images of a batch with non-finite gradients in output_dir/debug as well."
    )
    ddp_timeout: int = setting(1800, "Seconds after which a process stops waiting for the others.", ge=1)


@dataclass
class DataConfig:
    """Image-text pairs and how they are read."""

    train_data: str = setting(
        "",
        "Training pairs: WebDataset tars or parquet files (a folder, a pattern with {000..123} or *, or "
        "hf://datasets/OWNER/NAME/PATTERN), a CSV, TSV or JSON file, an image folder, a saved data set or one of the "
        "Hub; several sources are separated by ::.",
        is_path=True,
        required=True,
    )
    train_data_weights: list[float] = setting(
        [], "Share of each source of train_data in an epoch, of any sum; by default proportional to its size.", gt=0
    )
    samples_per_epoch: int = setting(
        0, "Pairs per epoch, drawn from sources that repeat endlessly; 0 uses every pair once.", ge=0
    )
    shuffle: Literal["samples", "shards", "none"] = setting(
        "samples", "Order of the pairs: shuffle all of them, shards and a buffer of pairs, or none."
    )
    shuffle_buffer: int = setting(10_000, "Pairs in the shuffle buffer, with shuffle shards.", ge=1)
    train_split: str = setting("train", "Split of a data set that has several.")
    csv_separator: str | None = setting(
        None, "Separator of CSV and TSV files; by default the one that gives the columns."
    )
    shard_cache_size: float = setting(50.0, "Gigabytes of remote shards that stay on the local disk.", gt=0)
    image_column: str = setting("image", "Column with the images.")
    caption_column: str = setting("caption", "Column with the captions.")
    further_caption_columns: list[str] = setting(
        [], "Further columns with captions; each time a pair is used, one of its captions is drawn."
    )
    alternative_captions_column: str | None = setting(
        None, "Column with lists of captions; each time a pair is used, one of its captions is drawn."
    )
    keywords_column: str | None = setting(None, "Column with lists of keywords to mix into the captions.")
    keywords_probability: float = setting(
        0.5, "Probability that a caption gets keywords, with keywords_column.", ge=0, le=1
    )
    group_column: str | None = setting(
        None, "Column whose equal values are kept out of one batch, to avoid false negatives."
    )
    augmentation: AugmentationConfig = field(
        default_factory=AugmentationConfig,
        metadata={"help": "Random changes to training images, see AugmentationConfig below.", "required": False},
    )
    dataloader_num_workers: int = setting(1, "Processes that decode images, per training process.", ge=0)
    max_image_pixels: int = setting(89_478_485, "Number of pixels above which an image is skipped undecoded.", ge=1)
    max_bad_fraction: float = setting(
        0.01, "Fraction of unusable pairs above which the run stops, once 1000 pairs have been read.", ge=0, le=1
    )
    pad_text_to_multiple: int = setting(
        1,
        "Pad texts to the longest of the batch, rounded up to a multiple of this number of tokens; -1 pads to the "
        "context length.",
        ge=-1,
    )
    text_groups: int = setting(
        1, "Number of groups of similar length that a batch's texts are encoded in, each padded by itself.", ge=1
    )


@dataclass
class ModelConfig:
    """The model, fresh or pretrained."""

    model: str | None = setting(
        None,
        "Folder or Hub name of a model to continue from, with its processor; by default the model is fresh.",
        is_path=True,
    )
    vision_config: dict[str, Any] = setting(
        {}, "Image encoder: any Transformers configuration, named by its model_type; by default CLIP's ViT-B/32."
    )
    text_config: dict[str, Any] = setting(
        {}, "Text encoder: any Transformers configuration; its vocab_size limits a tokenizer that is trained here."
    )
    amortizer_config: dict[str, Any] = setting({}, "Amortizer heads: head_type, width_factor and size.")
    projection_dim: int = setting(512, "Dimension of the shared embedding space.", ge=1)
    logit_scale_init_value: float | None = setting(
        None, "Natural logarithm of the initial logit scale; by default the objective's, usually log(1 / 0.07)."
    )
    logit_bias_init_value: float | None = setting(
        None, "Initial logit bias; by default the objective's, usually no bias."
    )
    tokenizer: str | None = setting(
        None, "Folder or Hub name of a tokenizer; by default one is trained on the captions.", is_path=True
    )
    freeze: list[Literal["vision", "text"]] = setting([], "Encoders that are not trained: vision, text.")
    lora: LoraConfig | None = field(
        default=None,
        metadata={"help": "Adapters to train in place of the encoders, see LoraConfig below.", "required": False},
    )
    patch_dropout: float = setting(
        0.0, "Fraction of image patches dropped in training, for encoders with a class token.", ge=0, lt=1
    )
    sync_batchnorm: bool = setting(False, "Compute batch normalization over the batches of all GPUs.")
    compile: bool = setting(False, "Compile the encoders with torch.compile.")
    channels_last: bool = setting(False, "Store images with channels last, which speeds up convolutions on GPUs.")


@dataclass
class ObjectiveConfig:
    """What is minimized."""

    objective: str = setting("amorlip", "Objective: amorlip, clip, dcl, siglip, sogclr, fastclip or neuclip.")
    objective_args: dict[str, Any] = setting(
        {}, "Settings of the objective, listed in its file in training/objectives/."
    )
    negatives: Literal["global", "local"] = setting(
        "global", "Negatives of a pair: the batches of all processes, or the process's own batch."
    )


@dataclass
class OptimizationConfig:
    """Optimizer, schedule and precision."""

    seed: int = setting(0, "Seed for weight initialization, data order and augmentation.", ge=0, lt=2**32)
    num_train_epochs: int = setting(1, "Number of epochs.", ge=1)
    max_steps: int = setting(-1, "Number of steps after which training stops; -1 trains for num_train_epochs.", ge=-1)
    per_device_train_batch_size: int = setting(128, "Pairs per process and step.", ge=1)
    micro_batch_size: int = setting(
        0,
        "Pairs encoded at a time to save memory, by gradient caching: the result is the whole batch's; 0 encodes all "
        "at once.",
        ge=0,
    )
    optimizer: str = setting(
        "adamw", "Optimizer: torch's by name, such as adamw or sgd, or timm's where it is installed."
    )
    optimizer_args: dict[str, Any] = setting({}, "Further options of the optimizer, such as momentum of sgd.")
    learning_rate: float = setting(1e-3, "Peak learning rate of the optimizer.", gt=0)
    layer_decay: float = setting(
        1.0,
        "Factor of the learning rate from each layer of an encoder to the one before it; 1 is the same for all.",
        gt=0,
        le=1,
    )
    logit_scale_learning_rate: float = setting(1e-4, "Peak learning rate of the logit scale.", gt=0)
    logit_scale_slow_above: float | None = setting(
        None, "Logit scale above which its learning rate is divided by three; by default never.", gt=0
    )
    max_logit_scale: float = setting(100.0, "Upper bound of the logit scale.", gt=0)
    weight_decay: float = setting(0.2, "Weight decay, applied to matrices only.", ge=0)
    adam_beta1: float = setting(0.9, "Decay rate of AdamW's first moment.", ge=0, lt=1)
    adam_beta2: float = setting(0.98, "Decay rate of AdamW's second moment.", ge=0, lt=1)
    adam_epsilon: float = setting(1e-6, "Constant in AdamW's denominator.", gt=0)
    warmup_steps: int = setting(0, "Steps of linear warmup.", ge=0)
    lr_scheduler_type: Literal["cosine", "constant", "wsd"] = setting(
        "cosine", "Learning rate after the warmup: a cosine decay to 0, constant, or constant with a final decay (wsd)."
    )
    decay_steps: int = setting(0, "Steps of the linear decay to 0 at the end, with wsd.", ge=0)
    max_grad_norm: float = setting(1.0, "Norm that gradients are clipped to; 0 turns clipping off.", ge=0)
    ema_decay: float = setting(
        0.0, "Decay rate per step of a moving average of the weights, saved in ema/; 0 keeps none.", ge=0, lt=1
    )
    max_skipped_steps: int = setting(
        20, "Number of consecutive steps skipped for non-finite gradients after which the run stops.", ge=1
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = setting(
        "auto", "Precision of the encoders; auto follows Accelerate's setting, or is bf16 on a GPU that has it."
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass to save memory.")


@dataclass
class PretrainConfig(OptimizationConfig, ObjectiveConfig, ModelConfig, DataConfig, RunConfig):
    """Settings of a pretraining run, in one flat namespace; paths have their `~` expanded."""

    def __post_init__(self) -> None:
        expand_home(self)
        check_fields(self)
        if self.max_steps == 0:
            raise user_error("max_steps must be -1 (no limit) or at least 1, got 0.")
        if self.pad_text_to_multiple == 0:
            raise user_error("pad_text_to_multiple must be -1 (the context length) or at least 1, got 0.")
        self._check_evaluation()
        self._check_model()

    def _check_evaluation(self) -> None:
        if self.eval_every and not (self.eval_tasks or self.validation_samples):
            raise user_error(
                f"eval_every is {self.eval_every} but eval_tasks is empty and validation_samples is 0: "
                "name tasks, hold out pairs, or set eval_every to 0."
            )

    def _check_model(self) -> None:
        if self.model and (self.vision_config or self.text_config):
            raise user_error("model and vision_config or text_config contradict each other: drop one.")
        if self.model and self.tokenizer:
            raise user_error("model and tokenizer contradict each other: a model brings its own tokenizer; drop one.")
        if self.lora and not self.model:
            raise user_error("lora adapts a trained model: name one with model, or leave lora out.")
        if self.lora and {"vision", "text"} <= set(self.freeze):
            raise user_error("lora has no encoder left to adapt with both in freeze: take one out of freeze.")


def print_help_and_exit(argv: list[str]) -> None:
    """Print every setting and exit, if the command line asks for help; takes under a second, without torch."""
    if not {"--help", "-h"} & set(argv):
        return
    groups = {
        "Run": RunConfig,
        "Data": DataConfig,
        "Model": ModelConfig,
        "Objective": ObjectiveConfig,
        "Optimization": OptimizationConfig,
    }
    nested = {"augmentation": AugmentationConfig, "lora": LoraConfig}
    print(format_help(DESCRIPTION, USAGE, groups, nested), end="")
    sys.exit(0)


def parse_config(argv: list[str]) -> PretrainConfig:
    """Return the configuration of `--config RECIPE [--field value ...]`, or print the help and exit.

    Raises:
        UserError: The recipe or a setting is wrong; the message names the field, the value and the way out.
    """
    print_help_and_exit(argv)
    return read_settings(PretrainConfig, argv)
