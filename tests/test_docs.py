"""Check the documents against the code: commands parse, Python runs, links and mentioned paths exist."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.checkout import ROOT
from tests.helpers.commands import check_command
from tests.helpers.documents import DOCUMENTS, Block, read_anchors, read_blocks, read_links, read_paths, split_commands
from training.config import PretrainConfig


README = ROOT / "README.md"
GUIDES = [README, *sorted(ROOT.glob("docs/*.md"))]
NOT_HERE = ("facebook/", "outputs/lora", "mteb", 'demo_data/emoji"', "amorlip/emoji-demo", "{{ repo_id }}")
"""What a Python block needs that a test does not have: such a block is compiled and not run."""
FIRST_PARTY = ("modeling_amorlip", "eval", "training")
SHELL = [pytest.param(block, id=str(block)) for block in read_blocks("bash")]
PYTHON = [pytest.param(block, id=str(block)) for block in read_blocks("python")]
RUN = {
    "README.md": ("python eval/apps/classify.py", "python eval/apps/search.py"),
    "docs/evaluation.md": ("python eval/run.py --model outputs/emoji_demo --tasks emoji_openmoji",),
}
"""Commands that are executed as they stand, by document and beginning."""


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


@pytest.mark.e2e
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


@pytest.mark.parametrize("document", GUIDES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_options_in_the_text_exist(document: Path):
    """Options in inline code are fields of a training run or options of a script."""
    fields = {field.name for field in dataclasses.fields(PretrainConfig)}
    sources = "".join(path.read_text() for floor in FIRST_PARTY for path in (ROOT / floor).rglob("*.py"))
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    options = {option for code in re.findall(r"`([^`]+)`", text) for option in re.findall(r"--([a-z]\w*)", code)}
    unknown = {name for name in options - fields - {"help", "cpu", "signal"} if f'"--{name}"' not in sources}
    assert not unknown


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 250


def test_readme_tables_are_those_of_the_results(capsys, monkeypatch):
    """The block of docs/results.md that prints the tables gives the figures that the README states."""
    monkeypatch.chdir(ROOT)
    block = next(b for b in read_blocks("python") if b.document == "docs/results.md")
    exec(compile(block.text, str(block), "exec"), {})
    printed = [line.split(" | ") for line in capsys.readouterr().out.strip().splitlines()]
    section = README.read_text(encoding="utf-8").partition("## Is it any good?")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.split("|")[2:5]] for line in lines]
    stated = [[cell.replace("−", "-") for cell in row] for row in rows]
    assert len(stated) == len(printed) == 11
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


def test_task_groups_are_documented():
    from eval.tasks import AGGREGATES, known_tasks

    section = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8").partition("## Tasks and groups")[2]
    table, _, rest = section.partition("\n\nEach task")
    groups = {group for task in known_tasks().values() for group in task.groups if not group.startswith("vtab_")}
    rows = re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == groups
    assert all(f"`{name}`" in rest for name in AGGREGATES)


def test_scorings_are_documented():
    from eval.scoring import SCORINGS

    section = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8").partition("## Scoring")[2].partition("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == SCORINGS


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
