"""The README's examples, run as they stand there, on a tiny model in the place of the demo's."""

import re
import subprocess
import sys

import pytest

from tests.helpers.checkout import ROOT, with_threads


README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def checkout(tiny_model, emoji_files, tmp_path):
    """A folder that looks like the repository after the demo, with a few images to search."""
    for name in ("demo_data", "eval", "modeling_amorlip", "training"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/emoji_demo").symlink_to(tiny_model)
    (tmp_path / "outputs/openmoji").symlink_to(emoji_files / "even")
    return tmp_path


def section(title: str) -> str:
    return re.search(rf"\n## {title}\n(.*?)(?=\n## |\Z)", README, re.S)[1]


def test_python_of_use(checkout):
    blocks = re.findall(r"```python\n(.*?)```", section("Use"), re.S)
    assert len(blocks) == 2
    # The second goes on with what the first has loaded.
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=checkout, capture_output=True, text=True, env=with_threads(1)
    )
    assert result.returncode == 0 and "tensor" in result.stdout, result.stderr


def commands(title: str) -> list[str]:
    shell = "\n".join(re.findall(r"```bash\n(.*?)```", section(title), re.S))
    lines = shell.replace("\\\n", "").splitlines()
    wanted = (
        "python eval/apps/search.py",
        "python eval/apps/classify.py",
        "python -m modeling_amorlip.export",
        "python eval/run.py",
    )
    return [line for line in lines if line.startswith(wanted)]


@pytest.mark.parametrize("title, number", [("Search and label", 2), ("In other tools", 1), ("Evaluate", 2)])
def test_commands(checkout, title, number):
    named = [c for c in commands(title) if "datacomp" not in c]  # whose data is not here
    assert len(named) == number
    some = min((checkout / "outputs/openmoji").glob("*.png")).relative_to(checkout)
    for command in named:
        command = re.sub(r"outputs/openmoji/\S+\.png", f"'{some}'", command)  # not all of the set are here
        command = command.replace("python ", f"{sys.executable} ", 1)
        result = subprocess.run(
            command, shell=True, cwd=checkout, capture_output=True, text=True, env=with_threads(1), timeout=300
        )
        assert result.returncode == 0, command + result.stderr
