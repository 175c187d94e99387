"""Files that the study's and the benchmarks' documentation names."""

from __future__ import annotations

import ast
import re

import pytest

from tests.helpers.checkout import ROOT


FOLDERS = ("training/study", "training/benchmarks")
SCRIPTS = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
CONFIGS = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).glob("*.yaml"))
COMMITTED = re.compile(
    r"\b(?:training|eval|docs|demo_data|modeling_amorlip)/[\w/.-]+\.(?:py|yaml|json|png|parquet|md)\b"
)


@pytest.mark.parametrize("path", [*SCRIPTS, *CONFIGS], ids=str)
def test_named_files_exist(path):
    """Scripts, configurations, results and figures named in docstrings, comments and commands are in the checkout."""
    for name in COMMITTED.findall((ROOT / path).read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), f"{path} names {name}"


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_commands_in_docstrings_start_with_the_script(path):
    text = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
    commands = re.findall(r"^    python (\S+)", text, re.MULTILINE)
    assert set(commands) <= {str(path)}
    is_script = "__main__" in (ROOT / path).read_text(encoding="utf-8")
    assert bool(commands) == is_script


def test_benchmark_figures_have_a_command():
    """Every committed figure of a benchmark is the --output of a documented command."""
    commands = "\n".join((ROOT / path).read_text(encoding="utf-8") for path in SCRIPTS)
    for figure in (ROOT / "training/benchmarks").glob("*.json"):
        assert f"--output training/benchmarks/{figure.name}" in commands
