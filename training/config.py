"""Typed, validated configuration of a training run: a YAML recipe, overridden from the command line.

    accelerate launch training/pretrain.py --config training/recipes/emoji_demo.yaml --learning_rate 5e-4

Every field below can stand in the recipe and on the command line; members of a mapping are reached with a dot, as in
`--augmentation.rotation 15` or `--vision_config.hidden_size 192`. An unknown field is refused, naming the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import textwrap
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from modeling_amorlip.cli_amorlip import UserError


def _field(default: Any, help: str) -> Any:
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class AugmentationConfig:
    """Random changes to training images. The defaults are the paper's: a slight crop and nothing else."""

    crop_scale: list[float] = _field([0.9, 1.0], "range of the crop's area, as a fraction of the image's")
    crop_ratio: list[float] = _field([0.75, 4 / 3], "range of the crop's width / height")
    horizontal_flip: float = _field(0.0, "probability of a mirror image")
    rotation: float = _field(0.0, "largest rotation, degrees either way")
    translation: float = _field(0.0, "largest shift, as a fraction of the side")
    zoom: list[float] = _field([1.0, 1.0], "range of magnification; below 1 the border is continued")
    color_jitter: float = _field(0.0, "largest change of brightness, contrast and saturation, as a fraction")
    restyle: float = _field(0.0, "probability of other tones, colours, sharpness or outlines")

    def __post_init__(self):
        for name in ("crop_scale", "crop_ratio", "zoom"):
            value = getattr(self, name)
            if len(value) != 2 or not 0 < value[0] <= value[1]:
                raise UserError(f"augmentation.{name} must be [low, high] with 0 < low <= high, got {value}.")
        if self.crop_scale[1] > 1:
            raise UserError(f"augmentation.crop_scale {self.crop_scale} reaches above 1, the whole image.")
        for name in ("horizontal_flip", "rotation", "translation", "color_jitter", "restyle"):
            limit = 180 if name == "rotation" else 1
            if not 0 <= getattr(self, name) <= limit:
                raise UserError(f"augmentation.{name} must lie in 0 to {limit}, got {getattr(self, name)}.")


@dataclass
class LoraConfig:
    """Low-rank adapters on both encoders, then all that is trained of them (LoRA); none where nothing is set."""

    rank: int = _field(8, "of the adapters' products")
    alpha: float = _field(16.0, "the products are multiplied by alpha / rank")
    dropout: float = _field(0.0, "probability that an adapter's input is dropped in training")
    target_modules: list[str] = _field(["q_proj", "v_proj"], "names of the layers that are adapted, CLIP's attention")

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"lora.rank must be at least 1, got {self.rank}.")
        if self.alpha <= 0:
            raise UserError(f"lora.alpha must be above 0, got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout must lie in 0 to below 1, got {self.dropout}.")
        if not self.target_modules:
            raise UserError("lora.target_modules is empty: name layers to adapt, such as q_proj.")


@dataclass
class RunConfig:
    """Settings of a run as a whole: where it writes, how often it saves, logs and evaluates."""

    output_dir: str = _field("", "folder for the model, checkpoints and metrics (required)")
    resume_from_checkpoint: str | None = _field(None, "'latest', or a folder checkpoints/step_XXXXXXXX")
    checkpoint_every: int = _field(1000, "steps between checkpoints")
    keep_last: int = _field(2, "number of checkpoints kept")
    keep_every: int = _field(0, "steps whose multiples' checkpoints are kept for good; 0 keeps the last only")
    log_every: int = _field(10, "steps between lines of metrics.jsonl")
    eval_every: int = _field(0, "steps between evaluations; 0 evaluates at the end only")
    eval_tasks: list[str] = _field([], "tasks of eval/run.py to run; the best model by the first is kept in best/")
    validation_samples: int = _field(0, "pairs left out of training, whose InfoNCE loss is part of evaluations")
    push_to_hub: str | None = _field(None, "repository USER/NAME that the finished model is published to")
    report_to: str = _field("none", "tracker for Accelerate's log_with: none, tensorboard, wandb, ...")


@dataclass
class DataConfig:
    """Settings of the training data."""

    train_data: str = _field(
        "",
        "WebDataset tars or parquet (folder, pattern with {000..123} or *, hf://datasets/OWNER/NAME/PATTERN), CSV, TSV "
        "or JSON file, image folder, saved data set or Hub name; several divided by :: (required)",
    )
    train_data_weights: list[float] = _field([], "share of each source of train_data in an epoch; else by its size")
    samples_per_epoch: int = _field(0, "pairs an epoch, drawn from sources gone through endlessly; 0: every pair once")
    shuffle: Literal["samples", "shards", "none"] = _field("samples", "mix all pairs, shards and a buffer, or nothing")
    shuffle_buffer: int = _field(10_000, "pairs that are mixed among each other, with shuffle shards")
    train_split: str = _field("train", "split of the data set")
    csv_separator: str | None = _field(None, "separator of CSV and TSV files; else the one that gives the columns")
    shard_cache_size: float = _field(50.0, "gigabytes of remote shards that are kept on the local disk")
    image_column: str = _field("image", "column of images")
    caption_column: str = _field("caption", "column of captions")
    further_caption_columns: list[str] = _field([], "more columns of captions; one of all is drawn a time")
    alternative_captions_column: str | None = _field(None, "column of lists of captions, one of which is drawn a time")
    keywords_column: str | None = _field(None, "column of lists of keywords to mix into captions")
    keywords_probability: float = _field(0.5, "share of captions that get keywords, with keywords_column")
    group_column: str | None = _field(None, "column whose values should not meet in a batch (avoids false negatives)")
    augmentation: AugmentationConfig = field(
        default_factory=AugmentationConfig, metadata={"help": "random changes to images"}
    )
    dataloader_num_workers: int = _field(1, "processes that decode, for each training process")
    max_image_pixels: int = _field(89_478_485, "images of more pixels are left out, undecoded")
    max_bad_fraction: float = _field(0.01, "share of unusable pairs past which a run stops, once 1000 pairs were met")
    pad_text_to_multiple: int = _field(1, "texts are padded to the batch's longest, rounded up to this; -1: to context")
    text_groups: int = _field(1, "groups of similar length that a batch's texts are encoded in, each padded by itself")


@dataclass
class ModelConfig:
    """Settings of the model."""

    model: str | None = _field(None, "folder or Hub name to continue from, with processor; else the model is fresh")
    vision_config: dict = _field({}, "image encoder, any Transformers configuration with its model_type")
    text_config: dict = _field({}, "text encoder; vocab_size limits a tokenizer trained here")
    amortizer_config: dict = _field({}, "amortizer heads: head_type, width_factor, size")
    projection_dim: int = _field(512, "size of the embedding space")
    logit_scale_init_value: float | None = _field(None, "logarithm of the initial logit scale; else log(1 / 0.07)")
    logit_bias_init_value: float | None = _field(None, "initial logit bias; without it the model has none")
    tokenizer: str | None = _field(None, "name or folder; else one is trained on the captions")
    freeze: list[str] = _field([], "vision or text: encoders that are not trained (LiT)")
    lora: LoraConfig | None = _field(None, "adapters to train in place of the encoders of model")
    patch_dropout: float = _field(0.0, "share of image patches left out in training, of encoders with a class token")
    sync_batchnorm: bool = _field(False, "batch normalisation over the batches of all GPUs")
    compile: bool = _field(False, "compile the encoders with torch.compile")
    channels_last: bool = _field(False, "lay images out with channels last, faster for convolutions on GPUs")


@dataclass
class ObjectiveConfig:
    """Settings of the objective."""

    objective: str = _field("amorlip", "amorlip, clip, dcl, siglip, sogclr, fastclip or neuclip")
    objective_args: dict = _field({}, "settings of the objective, see its file")
    negatives: Literal["global", "local"] = _field("global", "negatives from all processes, or from each its own")


@dataclass
class OptimizationConfig:
    """Settings of the optimization."""

    seed: int = _field(0, "of initialisation, order and augmentation")
    num_train_epochs: int = _field(1, "passes over the data")
    max_steps: int = _field(-1, "stop after so many steps; -1 leaves it to num_train_epochs")
    per_device_train_batch_size: int = _field(128, "pairs a process and step")
    micro_batch_size: int = _field(0, "pairs encoded at a time, to save memory; the result is the whole batch's")
    learning_rate: float = _field(1e-3, "AdamW's, at its peak")
    logit_scale_learning_rate: float = _field(1e-4, "the logit scale's own, at its peak")
    logit_scale_slow_above: float | None = _field(None, "logit scale above which its learning rate is a third")
    max_logit_scale: float = _field(100.0, "upper bound of the logit scale")
    weight_decay: float = _field(0.2, "AdamW's, on matrices only")
    adam_beta1: float = _field(0.9, "AdamW's")
    adam_beta2: float = _field(0.98, "AdamW's")
    adam_epsilon: float = _field(1e-6, "AdamW's")
    warmup_steps: int = _field(0, "steps of linear warm-up before the cosine")
    max_grad_norm: float = _field(1.0, "norm that gradients are clipped to; 0 turns clipping off")
    max_skipped_steps: int = _field(20, "steps with non-finite gradients in a row, which are skipped, that stop a run")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = _field("auto", "auto is bf16 on a GPU that has it")
    gradient_checkpointing: bool = _field(False, "recompute activations in the backward pass to save memory")


@dataclass
class PretrainConfig(OptimizationConfig, ObjectiveConfig, ModelConfig, DataConfig, RunConfig):
    """Settings of a pretraining run, in one flat namespace."""

    def __post_init__(self):
        self.lora = self.lora or None
        for name in ("output_dir", "train_data"):
            if not getattr(self, name):
                raise UserError(f"{name} is not set: name it in the recipe or as --{name} PATH.")
        at_least_1 = ("per_device_train_batch_size", "num_train_epochs", "checkpoint_every", "keep_last", "log_every")
        for name in (*at_least_1, "text_groups"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        at_least_0 = ("eval_every", "warmup_steps", "dataloader_num_workers", "weight_decay", "max_grad_norm")
        for name in (*at_least_0, "micro_batch_size"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}.")
        for name in ("learning_rate", "logit_scale_learning_rate", "adam_epsilon"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}.")
        if not 0 <= self.keywords_probability <= 1:
            raise UserError(f"keywords_probability must lie in 0 to 1, got {self.keywords_probability}.")
        for name in ("samples_per_epoch", "validation_samples", "patch_dropout", "max_bad_fraction"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}.")
        for name in ("shuffle_buffer", "max_image_pixels", "max_skipped_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if any(weight <= 0 for weight in self.train_data_weights):
            raise UserError(f"train_data_weights must be above 0, got {self.train_data_weights}.")
        if unknown := set(self.freeze) - {"vision", "text"}:
            raise UserError(f"freeze is {sorted(unknown)[0]!r}; choose vision or text.")
        if self.lora and not self.model:
            raise UserError("lora adapts a trained model: name one with model, or leave lora out.")
        if self.lora and {"vision", "text"} <= set(self.freeze):
            raise UserError("lora has no encoder left to adapt with both in freeze: take one out of it.")
        if self.patch_dropout >= 1 or self.max_bad_fraction > 1:
            raise UserError("patch_dropout must lie below 1, and max_bad_fraction not above it.")
        if self.pad_text_to_multiple < 1 and self.pad_text_to_multiple != -1:
            raise UserError(f"pad_text_to_multiple must be -1 or at least 1, got {self.pad_text_to_multiple}.")
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(f"max_steps must be -1 (no limit) or at least 1, got {self.max_steps}.")
        if self.eval_every and not (self.eval_tasks or self.validation_samples):
            raise UserError(
                f"eval_every is {self.eval_every} but eval_tasks is empty and validation_samples 0: "
                "name tasks, hold out pairs, or set it to 0."
            )
        if self.model and (self.vision_config or self.text_config):
            raise UserError("model and vision_config or text_config contradict each other: drop one.")
        if self.model and self.tokenizer:
            raise UserError("model and tokenizer contradict each other: a model brings its own tokenizer; drop one.")


def build(cls: type, values: dict[str, Any], prefix: str = "") -> Any:
    """A `cls` dataclass from a mapping, its values converted to the fields' types (YAML reads 1e-3 as text).

    Raises:
        UserError: a field is unknown, where the nearest is named, or its value is of another type.
    """
    known, hints, converted = [f.name for f in dataclasses.fields(cls)], typing.get_type_hints(cls), {}
    for name, value in values.items():
        if name not in known:
            raise UserError(unknown_name("field", name, known, prefix))
        try:
            converted[name] = _convert(value, hints[name])
        except (TypeError, ValueError):
            expected = getattr(hints[name], "__name__", str(hints[name])).replace("typing.", "")
            raise UserError(f"{prefix}{name} must be {expected}, got {value!r}.") from None
    return cls(**converted)


def unknown_name(kind: str, name: str, known: list[str], prefix: str = "") -> str:
    """The message for a name that does not exist."""
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{nearest[0]}?" if nearest else f"there are: {', '.join(known)}."
    return f"Unknown {kind} {prefix}{name}: {hint}"


def parse_config(argv: list[str]) -> PretrainConfig:
    """Reads `--config RECIPE [--field value ...]`; raises `UserError` on whatever is wrong with it."""
    if "--help" in argv or "-h" in argv:
        print(help_text())
        raise SystemExit(0)
    overrides = _read_overrides(argv)
    config = overrides.pop("config", None)
    values = _read_recipe(str(config)) if config is not None else {}
    for key, value in overrides.items():
        *parents, leaf = key.split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise UserError(f"--{key}: {parent} is not a mapping.")
        target[leaf] = value
    return build(PretrainConfig, values)


def _read_overrides(argv: list[str]) -> dict[str, Any]:
    overrides, rest = {}, list(argv)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"Expected --field value, got {flag!r}; see --help.")
        name, equals, value = flag[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"--{name} needs a value.")
            value = rest.pop(0)
        overrides[name] = yaml.safe_load(value)
    return overrides


def _read_recipe(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise UserError(f"--config {path}: there is no such file; recipes lie in training/recipes/.")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold fields and values, one a line.")
    return values


def _convert(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return build(hint, value, f"{'lora' if hint is LoraConfig else 'augmentation'}.")
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(value, next(m for m in members if m is not type(None)))
    if origin is Literal:
        # YAML reads a bare `no` as False.
        value = "no" if value is False and "no" in members else value
        if value not in members:
            raise ValueError
        return value
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise TypeError
        return [_convert(v, members[0]) for v in value]
    hint = origin or hint
    if hint is float and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) and hint is not bool or not isinstance(value, hint):
        raise TypeError
    return value


SECTIONS = {
    "output_dir": "Output",
    "train_data": "Data",
    "model": "Model",
    "objective": "Objective",
    "seed": "Optimisation",
}
"""Headings of `--help`, each above the field it begins with."""


def help_text() -> str:
    """Every field with type, default and meaning, by section."""
    lines = [__doc__.strip()]
    for cls, prefix in ((PretrainConfig, ""), (AugmentationConfig, "augmentation."), (LoraConfig, "lora.")):
        if prefix:
            lines += ["", cls.__doc__.strip()]
        for f in dataclasses.fields(cls):
            if not prefix and f.name in SECTIONS:
                lines += ["", f"{SECTIONS[f.name]}:"]
            default = f.default_factory() if f.default is dataclasses.MISSING else f.default
            about = f"{f.metadata['help']} ({f.type}, default {default!r})"
            lines.append(f"  --{prefix}{f.name}")
            lines += textwrap.wrap(about, 110, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)
