"""What a run writes beside its model: its settings as a recipe, and logs with one JSON object per line."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from eval import report
from modeling_amorlip.cli_amorlip import UserError
from training.config_yaml import dump_yaml, load_yaml
from training.run.checkpointing import lock_folder


LOGS = ("metrics", "eval", "bad_samples", "bad_validation_samples", "loss_spikes")
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers")
CHECKOUT = Path(__file__).resolve().parents[2]


class RunLogger:
    """The settings and logs of one `output_dir`: `open` claims the folder, `append` adds a line.

    `run_config.yaml` holds every setting of the run's first start, as a recipe, and the versions it ran with. It is
    never overwritten: a resumed run writes what differs from it to `run_config_resumed_STEP.yaml`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock: IO[str] | None = None

    def open(self, settings: dict[str, Any], step: int) -> None:
        """Claim the folder until `close`, record the settings and cut the logs to `step`.

        Args:
            settings: Every setting of the run.
            step: The step that the run starts from. Later lines belong to steps after the last checkpoint, which are
                done again.

        Raises:
            UserError: The folder cannot be written, or another run uses it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.folder)
            self._record_settings({**settings, "versions": collect_versions()}, step)
            for name in LOGS:
                self._cut(name, step)
        except OSError as error:
            raise UserError(f"output_dir {self.folder} cannot be written: {error.strerror}.") from None

    def close(self) -> None:
        """Give up the claim on the folder."""
        if self._lock is not None:
            self._lock.close()

    def lines(self, name: str) -> list[str]:
        """Return the complete lines of a log, whose last line may have been cut off."""
        path = self.folder / f"{name}.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return text[: text.rfind("\n") + 1].splitlines()

    def append(self, name: str, values: dict[str, Any]) -> None:
        """Add a line to a log, in one write, so that processes can share it; NaN and infinities become null.

        Raises:
            UserError: The line cannot be written, as on a full disk.
        """
        line = json.dumps(replace_nonfinite(values), allow_nan=False)
        try:
            with (self.folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise UserError(
                f"{self.folder / f'{name}.jsonl'} cannot be written: {error.strerror}. Make room, then continue with "
                "--resume_from_checkpoint latest."
            ) from None

    def _record_settings(self, document: dict[str, Any], step: int) -> None:
        """Write run_config.yaml at the first start, and later what differs from it."""
        path = self.folder / "run_config.yaml"
        if not path.exists():
            _write_whole(path, dump_yaml(document))
            return
        first = read_run_config(self.folder)
        changes = {name: value for name, value in document.items() if name not in first or first[name] != value}
        if changes:
            _write_whole(self.folder / f"run_config_resumed_{step:08d}.yaml", dump_yaml(changes))

    def _cut(self, name: str, step: int) -> None:
        """Drop a log's lines of steps after `step`, and a last line that was cut off."""
        path = self.folder / f"{name}.jsonl"
        if path.exists():
            kept = [line + "\n" for line in self.lines(name) if step_of(line) <= step]
            _write_whole(path, "".join(kept))


def step_of(line: str) -> float:
    """Return the step of a line, infinity for one that is damaged, as after a power failure."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf


def read_run_config(folder: Path) -> dict[str, Any]:
    """Return the settings of a run's first start, and under `versions` what it ran with.

    Raises:
        UserError: The folder has no run_config.yaml that can be read.
    """
    if not (folder / "run_config.yaml").is_file():
        raise UserError(f"{folder / 'run_config.yaml'} cannot be read: there is no such file.")
    return report.read_run_config(folder, load_yaml)


def replace_nonfinite(value: Any) -> Any:
    """Return a JSON value with null in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: replace_nonfinite(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [replace_nonfinite(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat(values: dict[str, Any]) -> dict[str, int | float | str | bool]:
    """Return settings as trackers take them: members of mappings get dotted names, lists become text."""
    result: dict[str, int | float | str | bool] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= {f"{key}.{name}": member for name, member in flat(value).items()}
        else:
            result[key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return result


def collect_versions() -> dict[str, str]:
    """Return the versions of Python, of the packages that training depends on, and of this checkout."""
    return {
        "python": platform.python_version(),
        **{name: _package_version(name) for name in PACKAGES},
        "git": git_revision(CHECKOUT),
    }


def git_revision(checkout: Path) -> str:
    """Return the commit of a checkout, or "unknown" where git is missing or the folder is not a repository's root.

    A folder inside another project's repository must not be recorded with that project's commit.
    """
    command = ["git", "rev-parse", "--show-toplevel", "HEAD"]
    try:
        result = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
        root, revision = result.stdout.splitlines()
    except (OSError, subprocess.CalledProcessError, ValueError):
        return "unknown"
    return revision if Path(root).resolve() == checkout.resolve() else "unknown"


def _package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _write_whole(path: Path, text: str) -> None:
    """Write a file aside and rename it, so that a process killed in between leaves the old one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
