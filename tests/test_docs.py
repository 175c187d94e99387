"""Check the documents against the code: commands parse, Python runs, links and mentioned paths exist."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.checkout import ROOT
from tests.helpers.documents import DOCUMENTS, Block, read_anchors, read_blocks, read_links, read_paths, split_commands


README = ROOT / "README.md"
OTHER_PROGRAMS = {".", "bash", "cffconvert", "cp", "git", "hf", "mypy", "pre-commit", "ruff"}
"""Programs whose arguments are not the project's."""
NOT_HERE = ("facebook/", "outputs/lora", "mteb", 'demo_data/emoji"', "amorlip/emoji-demo", "{{ repo_id }}")
"""What a Python block needs that a test does not have: such a block is compiled and not run."""
FIRST_PARTY = ("modeling_amorlip", "eval", "training")
PLACEHOLDERS = {"RECIPE.yaml": "training/recipes/emoji_demo.yaml"}
SHELL = [pytest.param(block, id=str(block)) for block in read_blocks("bash")]
PYTHON = [pytest.param(block, id=str(block)) for block in read_blocks("python")]
RUN = {
    "README.md": ("python eval/apps/classify.py", "python eval/apps/search.py"),
    "docs/evaluation.md": ("python eval/run.py --model outputs/emoji_demo --tasks emoji_openmoji",),
}
"""Commands that are executed as they stand, by document and beginning."""


class _ParsedError(BaseException):
    """Ends a command line once its arguments are parsed."""


@pytest.fixture
def checkout(tiny_model, emoji_files, tmp_path, monkeypatch):
    """Make the working directory look like the repository after the demo, with a tiny model in the demo's place."""
    for name in ("demo_data", "eval", "modeling_amorlip", "training"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/emoji_demo").symlink_to(tiny_model)
    (tmp_path / "pictures").symlink_to(emoji_files / "even")
    (tmp_path / "photo.jpg").symlink_to(min((emoji_files / "even").iterdir()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_arguments(module: str, arguments: list[str], monkeypatch) -> None:
    """Parse arguments by a script's own parser and stop there."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise _ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(_ParsedError):
        importlib.import_module(module).main()


def check_pretrain(arguments: list[str]) -> None:
    from training.config import parse_config

    if arguments == ["--help"]:
        return
    config = parse_config([PLACEHOLDERS.get(argument, argument) for argument in arguments])
    if "--objective_args" in arguments:
        given = yaml.safe_load(arguments[arguments.index("--objective_args") + 1])
        assert config.objective_args == given, "the recipe's own options are replaced, not merged"


def check_python(arguments: list[str], monkeypatch) -> None:
    if arguments[0] == "-c":
        compile(arguments[1], "<command>", "exec")
        return
    if arguments[0] == "-m":
        module, arguments = arguments[1], arguments[2:]
        if module == "pytest":
            check_pytest(arguments)
            return
        if module == "venv":
            return
    else:
        path, arguments = Path(arguments[0]), arguments[1:]
        assert (ROOT / path).is_file(), path
        module = ".".join(path.with_suffix("").parts)
    if module == "training.pretrain":
        check_pretrain(arguments)
    elif module == "eval.apps.clip_benchmark_models" or module.startswith("demo_data."):
        pass  # parsed by a library that is not installed, and a script without arguments
    else:
        check_arguments(module, arguments, monkeypatch)


def check_pytest(arguments: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for argument in arguments:
        if argument.startswith("tests/"):
            assert (ROOT / argument).exists(), argument
    if "-m" in arguments:
        for marker in re.findall(r"(?!not\b|and\b|or\b)\b\w+", arguments[arguments.index("-m") + 1]):
            assert f'"{marker}:' in project, f"unknown marker {marker}"


def check_pip(arguments: list[str]) -> None:
    packaging = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("setup.py", "pyproject.toml"))
    for argument in arguments:
        if match := re.fullmatch(r"\.\[([\w,]+)\]", argument):
            for extra in match[1].split(","):
                assert re.search(rf'^\s*"?{extra}"?\s*[:=]\s*\[', packaging, re.MULTILINE), f"unknown extra {extra}"


def check_launcher(program: str, arguments: list[str], monkeypatch) -> None:
    """Parse the launcher's options by its own parser, then those of the script that it starts."""
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        launched = get_args_parser().parse_args(arguments)
        check_python([launched.training_script, *launched.training_script_args], monkeypatch)
        return
    from accelerate.commands.launch import launch_command_parser

    assert arguments[0] == "launch", arguments
    launched = launch_command_parser().parse_args(arguments[1:])
    assert launched.config_file is None or (ROOT / launched.config_file).is_file(), launched.config_file
    check_python([launched.training_script, *launched.training_script_args], monkeypatch)


def check_command(command: list[str], monkeypatch) -> None:
    program, arguments = Path(command[0]).name or command[0], command[1:]
    if program in ("python", "python3"):
        check_python(arguments, monkeypatch)
    elif program in ("accelerate", "torchrun"):
        check_launcher(program, arguments, monkeypatch)
    elif program == "srun":
        # The nested command line is its last word. SLURM's variables stand for numbers and names here.
        nested = re.sub(r"\$\([^)]*\)", "host", arguments[-1])
        for inner in split_commands(nested.replace("$SLURM_NODEID", "0")):
            check_command(inner, monkeypatch)
    elif program == "pip":
        check_pip(arguments)
    elif program == "pytest":
        check_pytest(arguments)
    else:
        assert program in OTHER_PROGRAMS or command[0] in OTHER_PROGRAMS, f"{program} is checked by no test"


@pytest.mark.parametrize("block", SHELL)
def test_shell_blocks_parse(block: Block, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = re.sub(r"\$(seed|N)\b", "0", block.text)
    commands = split_commands(text)
    assert commands
    for command in commands:
        with monkeypatch.context() as patch:
            check_command(command, patch)


@pytest.mark.parametrize("block", PYTHON)
def test_python_blocks_run(block: Block, request, capsys):
    code = compile(block.text, str(block), "exec")
    if any(name in block.text for name in NOT_HERE):
        modules = {node.module for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.ImportFrom)}
        for module in modules:
            assert not module.startswith(FIRST_PARTY) or importlib.import_module(module)
        return
    request.getfixturevalue("checkout")
    exec(code, {"__name__": "__main__"})
    assert capsys.readouterr().out.strip(), "an example shows what it does"


def test_example_commands_run(checkout, monkeypatch, capsys):
    """Commands that a reader types after the demo, in this process."""
    pending = {(document, beginning) for document, beginnings in RUN.items() for beginning in beginnings}
    for block in read_blocks("bash"):
        for command in split_commands(block.text):
            beginnings = [b for b in RUN.get(block.document, ()) if " ".join(command).startswith(b)]
            if not beginnings:
                continue
            module = command[1].removesuffix(".py").replace("/", ".")
            monkeypatch.setattr(sys, "argv", command[1:])
            assert not importlib.import_module(module).main(), " ".join(command) + capsys.readouterr().err
            pending -= {(block.document, b) for b in beginnings}
    assert not pending
    assert (checkout / "results.json").is_file() and (checkout / "sheet.png").is_file()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_paths_exist(document: Path):
    broken = []
    for target in read_links(document):
        name, _, anchor = target.partition("#")
        linked = (document.parent / name) if name else document
        if not linked.exists() or (anchor and anchor not in read_anchors(linked)):
            broken.append(target)
    if document.name != "CHANGELOG.md":  # it names files that have moved
        broken += sorted(name for name in read_paths(document) if not any(ROOT.glob(name.rstrip("/"))))
    assert not broken


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 250


def test_readme_table_is_that_of_the_results(capsys, monkeypatch):
    """The block of docs/results.md that prints the table gives the figures that the README states."""
    monkeypatch.chdir(ROOT)
    block = next(b for b in read_blocks("python") if b.document == "docs/results.md")
    exec(compile(block.text, str(block), "exec"), {})
    printed = [line.split(" | ") for line in capsys.readouterr().out.strip().splitlines()]
    section = README.read_text(encoding="utf-8").partition("## Is it any good?")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[2:5]] for line in section.splitlines() if "±" in line]
    stated = [[cell.replace("−", "-") for cell in row] for row in rows]
    assert len(stated) == len(printed) == 6
    for row, (method, *cells) in zip(stated, printed, strict=True):
        assert row == ([*cells[:2], ""] if method == "clip" else cells), method


def test_objectives_and_recipes_are_documented():
    from training.objectives import OBJECTIVES

    training = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    table = training.partition("## Objectives")[2].partition("`amorlip` are those")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(OBJECTIVES)
    recipes = set(re.findall(r"^\| \[`(\w+)`\]", training, re.MULTILINE))
    assert recipes == {path.stem for path in (ROOT / "training/recipes").glob("*.yaml")}


def test_amorlip_options_are_documented():
    """Every option has a row with its default."""
    from training.objectives.amorlip import AmorLIPObjective

    training = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    table = training.partition("| option of `amorlip` |")[2].partition("\n\n")[0]
    stated = {}
    for names, defaults in re.findall(r"^\| (`.+?`) \| (.+?) \|", table, re.MULTILINE):
        for name, default in zip(names.split(", "), defaults.split(", "), strict=True):
            stated[name.strip("`")] = yaml.safe_load(default.strip("`"))
    actual = vars(AmorLIPObjective.Arguments())
    assert {name: str(float(v)) if re.fullmatch(r"[\d.e-]+", str(v)) else v for name, v in stated.items()} == {
        name: v if isinstance(v, (bool, str)) else str(float(v)) for name, v in actual.items()
    }


def test_citation_names_the_authors():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)
    names = [
        f"{author['family-names']}, {author['given-names']}" for author in citation["preferred-citation"]["authors"]
    ]
    bibtex = re.search(r"author\s*= \{(.*)\}", README.read_text(encoding="utf-8"))[1]
    assert bibtex.split(" and ") == names
    assert names[0] == "Sun, Haotian" and len(names) == 6


def test_continuous_integration_runs_the_same_commands():
    """README's test command is what .ci/run does, and the workflow runs .ci/run."""
    script = (ROOT / ".ci/run").read_text(encoding="utf-8").replace(" --quiet", "")
    tests = next(b for b in read_blocks("bash") if b.document == "README.md" and "pytest" in b.text)
    for command in tests.text.replace(" && ", "\n").strip().splitlines():
        assert command in script, command
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    steps = [step.get("run", "") for step in workflow["jobs"]["test"]["steps"]]
    assert "bash .ci/run" in steps
