"""Settings from recipes and the command line: types, bounds, precedence, and one clear message per mistake."""

import dataclasses
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest
import yaml

from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.checkout import ROOT
from training.config import LoraConfig, PretrainConfig, build, parse_config
from training.config_fields import setting
from training.config_yaml import dump_yaml, load_yaml


PATHS = "output_dir: out\ntrain_data: pairs.parquet\n"


@pytest.fixture
def parse(tmp_path):
    """Parses a recipe, given as text or bytes, and a command line."""

    def parse(command_line: str = "", recipe: str | bytes = "", paths: str = PATHS) -> PretrainConfig:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(recipe if isinstance(recipe, bytes) else (paths + recipe).encode())
        return parse_config(["--config", str(path), *shlex.split(command_line)])

    return parse


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["*.tar", "{00000..00001}.tar", "2024", "no", "2024-01-01", "1e-6", "null", "a: b", "[x", "'q'"]
)
def test_text_arrives_as_typed(parse, text):
    config = parse(shlex.join(["--train_data", text, "--caption_column", text, f"--image_column={text}"]))
    assert (config.train_data, config.caption_column, config.image_column) == (text, text, text)


def test_text_in_a_recipe_arrives_as_written(parse):
    config = parse(
        recipe="caption_column: no\nimage_column: 2024-01-01\ntrain_split: 010\nfurther_caption_columns: [no, 1]"
    )
    assert (config.caption_column, config.image_column, config.train_split) == ("no", "2024-01-01", "010")
    assert config.further_caption_columns == ["no", "1"]


@pytest.mark.parametrize("text", ["1e-6", "1.0e-6", "0.000001"])
def test_floats_of_free_mappings_are_numbers(parse, text):
    for config in (parse(f"--vision_config.eps {text}"), parse(recipe=f"vision_config: {{eps: {text}}}")):
        assert config.vision_config == {"eps": 1e-6}


def test_null_unsets_an_optional_setting(parse):
    assert parse("--group_column null", "group_column: concept").group_column is None
    assert parse(recipe="group_column: null").group_column is None
    assert parse("--lora null", "lora: {rank: 4}").lora is None


@pytest.mark.parametrize("nothing", ["~", ""])
def test_a_text_without_a_value_is_refused(parse, nothing):
    with pytest.raises(UserError, match="train_data must be text, got null"):
        parse(recipe=f"train_data: {nothing}", paths="output_dir: out\n")
    assert parse(recipe=f"group_column: {nothing}").group_column is None


@pytest.mark.parametrize("text", ["true", "True", "1", "yes", "on"])
def test_booleans(parse, text):
    assert parse(f"--compile {text}").compile is True
    assert parse(recipe=f"compile: {text}").compile is True


def test_flag_without_value_turns_a_boolean_on(parse):
    config = parse("--compile --seed 3 --channels_last")
    assert (config.compile, config.channels_last, config.seed) == (True, True, 3)


@pytest.mark.parametrize("words", ["'[a, b]'", """'["a", "b"]'""", "a b", "='[a, b]'"])
def test_lists(parse, words):
    assert parse(f"--eval_tasks{words if words.startswith('=') else ' ' + words}").eval_tasks == ["a", "b"]


def test_lists_of_numbers(parse):
    assert parse("--train_data_weights 1 2e-1").train_data_weights == [1.0, 0.2]
    assert parse("--augmentation.zoom '[0.5, 2]'").augmentation.zoom == [0.5, 2.0]


@pytest.mark.parametrize("flag", ["--objective_args.positive_weight -1e-8", "--objective_args.positive_weight=-1e-8"])
def test_values_may_begin_with_a_dash(parse, flag):
    assert parse(flag).objective_args == {"positive_weight": -1e-8}


@pytest.mark.parametrize("value", ["no", "false", "'no'"])
def test_mixed_precision_no(parse, value):
    assert parse(recipe=f"mixed_precision: {value}").mixed_precision == "no"
    assert parse(f"--mixed_precision {value}").mixed_precision == "no"


def test_integers_are_decimal(parse):
    assert parse("--seed 010 --samples_per_epoch 1_000").seed == 10


def test_leading_tilde_is_the_home_directory(parse, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("DATA", "/data")
    config = parse("--train_data '~/a/*.tar::$DATA/b::~/c' --output_dir ~/out --resume_from_checkpoint ~/run")
    assert config.train_data == "/home/someone/a/*.tar::$DATA/b::/home/someone/c"
    assert (config.output_dir, config.resume_from_checkpoint) == ("/home/someone/out", "/home/someone/run")
    assert (
        parse("--tokenizer '~/t'").tokenizer == "/home/someone/t" and parse("--model '~/m'").model == "/home/someone/m"
    )


# -- precedence --------------------------------------------------------------------------------------------------------


def test_command_line_wins_over_recipe(parse):
    config = parse("--seed 2 --seed 3", "seed: 1\nlearning_rate: 1e-4")
    assert (config.seed, config.learning_rate) == (3, 1e-4)


def test_members_are_merged_and_mappings_replaced(parse):
    config = parse("--augmentation.zoom 1 2 --lora.rank 4", "augmentation: {rotation: 10}\nlora: null\nmodel: m")
    assert (config.augmentation.rotation, config.augmentation.zoom) == (10.0, [1.0, 2.0])
    assert config.lora == LoraConfig(rank=4)
    recipe = "vision_config: &shared {a: 1, b: {c: 2}}\ntext_config: *shared"
    config = parse("--vision_config.b.d 3", recipe)
    assert config.vision_config == {"a": 1, "b": {"c": 2, "d": 3}} and config.text_config == {"a": 1, "b": {"c": 2}}
    assert parse("--vision_config '{e: 4}' --vision_config.f 5", recipe).vision_config == {"e": 4, "f": 5}
    assert parse("--augmentation '{zoom: [1, 2]}'", "augmentation: {rotation: 10}").augmentation.rotation == 0


def test_run_config_is_a_recipe(parse, tmp_path):
    options = (
        "--model m --lora.rank 4 --group_column null --mixed_precision no --caption_column 2024 --learning_rate 1e-6"
    )
    first = parse(options, "augmentation: {zoom: [0.5, 2]}\nobjective_args: {beta: 1e-3}")
    settings = dataclasses.asdict(first)
    for document in ({**settings, "versions": {"git": "unknown"}}, {"arguments": settings, "versions": {}}):
        path = tmp_path / "run_config.yaml"
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        assert parse_config(["--config", str(path)]) == first
    assert parse_config(["--config", str(path), "--seed", "3"]).seed == 3


@pytest.mark.parametrize(
    "text",
    [
        "no",
        "null",
        "~",
        "1e-6",
        "1.5",
        "010",
        "0x1f",
        "1:30",
        "2024-01-01",
        "*.tar",
        "{a}",
        "<<",
        "é",
        "\x85",
        "\udcff",
    ],
)
def test_settings_survive_being_written(parse, tmp_path, text):
    first = parse(shlex.join(["--caption_column", text, f"--group_column={text}"]))
    first.further_caption_columns = [text]
    first.vision_config = {text: text, "numbers": [1e-6, 1, True, None]}
    path = tmp_path / "run_config.yaml"
    path.write_text(dump_yaml(dataclasses.asdict(first)), encoding="utf-8")
    second = parse_config(["--config", str(path)])
    assert second.vision_config == first.vision_config and second.caption_column == text
    assert second == first
    for read in (yaml.safe_load, load_yaml):
        assert read(path.read_text(encoding="utf-8"))["vision_config"] == first.vision_config


def test_recipe_may_begin_with_a_byte_order_mark(parse):
    assert parse(recipe=b"\xef\xbb\xbf" + PATHS.encode()).output_dir == "out"


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command_line, message",
    [
        ("--learning_rat 1", "Unknown field learning_rat: did you mean learning_rate?"),
        ("--augmentation.rotatoin 1", "Unknown field augmentation.rotatoin: did you mean augmentation.rotation?"),
        ("--rotation 1", "did you mean augmentation.rotation?"),
        ("--lora.rnk 1", "did you mean lora.rank?"),
        ("--output-dir x", "did you mean output_dir?"),
        ("--vison_config.hidden_size 1", "did you mean vision_config?"),
        ("--qqqqqq 1", "Unknown field qqqqqq: --help lists all."),
        ("--learning_rate fast", "learning_rate must be a number, got 'fast'."),
        ("--learning_rate inf", "learning_rate must be a number, got 'inf'."),
        ("--learning_rate .inf", "learning_rate must be above 0, got inf."),
        ("--learning_rate .nan", "learning_rate must be above 0, got nan."),
        ("--learning_rate -1", "learning_rate must be above 0, got -1.0."),
        ("--learning_rate true", "learning_rate must be a number, got True."),
        ("--learning_rate null", "learning_rate must be a number, got null."),
        ("--learning_rate 1:30", "learning_rate must be a number, got '1:30'."),
        ("--logit_bias_init_value .nan", "logit_bias_init_value must be a finite number, got nan."),
        ("--seed 1.5", "seed must be an integer, got 1.5."),
        ("--seed 1e3", "seed must be an integer, got 1000.0."),
        ("--seed -1", "seed must be at least 0 and below 4294967296, got -1."),
        ("--seed", "--seed takes one value, got none."),
        ("--max_logit_scale 0", "max_logit_scale must be above 0, got 0.0."),
        ("--adam_beta2 1.5", "adam_beta2 must be at least 0 and below 1, got 1.5."),
        ("--micro_batch_size -1", "micro_batch_size must be at least 0, got -1."),
        ("--max_steps 0", "max_steps must be -1 (no limit) or at least 1, got 0."),
        ("--pad_text_to_multiple 0", "pad_text_to_multiple must be -1 (the context length) or at least 1, got 0."),
        ("--train_data_weights 1 0", "train_data_weights must be above 0, got [1.0, 0.0]."),
        ("--augmentation.crop_scale 0.5 2", "augmentation.crop_scale must be above 0 and at most 1, got [0.5, 2.0]."),
        ("--augmentation.zoom 2 1", "augmentation.zoom must be [low, high] with low <= high, got [2.0, 1.0]."),
        ("--augmentation.rotation 270", "augmentation.rotation must be at least 0 and at most 180, got 270.0."),
        ("--augmentation 3", "augmentation must be a mapping such as {name: value}, got 3."),
        ("--vision_config '{a: '", "vision_config must be a mapping such as {name: value}, got '{a: '."),
        ("--eval_tasks '[a'", "eval_tasks must be a list such as [a, b], got '[a'."),
        ("--freeze vison", "freeze must be a list of some of vision, text, got ['vison']."),
        ("--mixed_precision bf", "mixed_precision must be one of auto, no, bf16, fp16, got 'bf'."),
        ("--compile maybe", "compile must be true or false, got 'maybe'."),
        ("--seed.x 1", "seed is no mapping; set it with --seed VALUE."),
        ("--vision_config..a 1", "--vision_config..a is no field; write --field value, or --mapping.member value."),
        ("--train_data a.tar b.tar", "--train_data takes one value, got a.tar b.tar; put values with * "),
        ("-seed 1", "write fields with two dashes."),
        ("--config other.yaml", "--config is given twice"),
        ("--output_dir ''", "output_dir is not set"),
        ("--eval_every 5", "eval_tasks is empty and validation_samples is 0"),
        ("--lora.rank 8", "name one with model, or leave lora out."),
        ("--model m --lora.rank 8 --freeze vision text", "take one out of freeze."),
        ("--model m --vision_config.a 1", "model and vision_config or text_config contradict each other"),
        ("--model m --tokenizer t", "model and tokenizer contradict each other"),
    ],
)
def test_mistakes_on_the_command_line(parse, command_line, message):
    with pytest.raises(UserError) as error:
        parse(command_line)
    assert message in str(error.value)
    assert "\n" not in str(error.value) and str(error.value).endswith((".", "?"))


@pytest.mark.parametrize(
    "recipe, message",
    [
        ("", "holds no settings; write one per line"),
        ("# a comment\n", "holds no settings"),
        ("[a, b]", "holds no settings"),
        (PATHS + "seed: 1\nseed: 2\n", "line 4: the key seed is given twice. Keep one of the two."),
        (PATHS + "lora: {rank: 1, rank: 2}\n", "line 3: the key rank is given twice"),
        (PATHS + "lora:\n\trank: 1\n", "line 4: found character '\\t' that cannot start any token. Indent with spaces"),
        ("train_data: *.tar\n", "line 1: expected alphabetic or numeric character, but found '.'. Put text with"),
        ("train_data: {0..1}.tar\n", "line 1: expected <block end>, but found '<scalar>'. Put text with special"),
        ("output_dir: é\n".encode("latin-1"), "is not UTF-8 text (byte 12): save it as UTF-8."),
        (PATHS + "---\nseed: 1\n", "found another document"),
        (PATHS + "? [a]\n: 1\n", "found unhashable key"),
        (PATHS + "seed: \0\n", "special characters are not allowed"),
        (PATHS + "1: 2\n", "Unknown field 1"),
        (PATHS + "augmentation: {rotatoin: 1}\n", "did you mean augmentation.rotation?"),
        (PATHS + "lora: 3\n", "lora must be a mapping such as {name: value}, got 3."),
        (PATHS + "freeze: vision\n", "freeze must be a list of some of vision, text, got 'vision'."),
        ("output_dir: out\n", "train_data is not set: name it in the recipe or as --train_data PATH."),
    ],
)
def test_mistakes_in_a_recipe(parse, recipe, message):
    with pytest.raises(UserError) as error:
        parse(recipe=recipe, paths="")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_recipes_that_cannot_be_read(tmp_path):
    for path, message in (
        (tmp_path / "nowhere.yaml", "there is no such file"),
        (tmp_path, "is a folder; name a YAML file"),
    ):
        with pytest.raises(UserError, match=message):
            parse_config(["--config", str(path)])


def test_bounds_hold_without_a_recipe():
    with pytest.raises(UserError, match="train_data is not set"):
        PretrainConfig(output_dir="x")
    with pytest.raises(UserError, match="rank must be at least 1"):
        LoraConfig(rank=0)


# -- other dataclasses -------------------------------------------------------------------------------------------------


@dataclass
class Inner:
    rate: float = 1.0


@dataclass
class Settings:
    name: str
    kind: Literal["a", "b"] = "a"
    share: float = setting(0.5, "Share.", ge=0, lt=1)
    inner: dict[str, Inner] = field(default_factory=dict)

    def __post_init__(self):
        if self.name == "bad":
            raise ValueError("name must not be bad.")


def test_build_checks_any_dataclass():
    built = build(Settings, {"name": "x", "share": "1e-3", "inner": {"one": {"rate": 2}}}, "settings.")
    assert built == Settings("x", "a", 0.001, {"one": Inner(2.0)})
    for values, message in (
        ({}, "settings.name is not set"),
        ({"name": "x", "shar": 1}, "did you mean settings.share?"),
        ({"name": "x", "share": 1}, r"settings.share must be at least 0 and below 1, got 1\.0"),
        ({"name": "x", "kind": "c"}, "settings.kind must be one of a, b, got 'c'"),
        ({"name": "x", "inner": {"one": {"rat": 2}}}, "did you mean settings.inner.one.rate?"),
        ({"name": "bad"}, "name must not be bad"),
        ("x", "settings must be a mapping"),
    ):
        with pytest.raises(UserError, match=message):
            build(Settings, values, "settings.")


def test_yaml_keeps_dates_and_base_60_numbers_as_text():
    assert load_yaml("[2024-01-01, 1:30, 0x10, 1e3, 08, .5]") == ["2024-01-01", "1:30", "0x10", 1000.0, 8, 0.5]


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_help_lists_every_setting_without_importing_torch():
    code = (
        "import sys, runpy\nsys.argv = ['pretrain.py', '--help']\n"
        "try: runpy.run_path('training/pretrain.py', run_name='__main__')\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "0 False False"
    flags = [f"--{field.name} " for field in dataclasses.fields(PretrainConfig)]
    flags += ["--augmentation.rotation ", "--lora.rank "]
    assert [flag for flag in flags if f"\n  {flag}" not in result.stdout] == []
    titles = ("Run:", "Data:", "Model:", "Objective:", "Optimization:", "AugmentationConfig:", "LoraConfig:")
    positions = [result.stdout.index(f"\n{title}\n") for title in titles]
    assert positions == sorted(positions)
    assert "Seed for weight initialization, data order and augmentation." in " ".join(result.stdout.split())
