"""What a run writes beside its model: settings, metrics and reports, a JSON object a line, in a folder of its own."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import yaml

from modeling_amorlip.cli_amorlip import UserError
from training.run.checkpointing import lock_folder


LOGS = ("metrics", "eval", "bad_samples", "loss_spikes")


class RunLogger:
    """The logs of one `output_dir`: `open` claims the folder, `append` adds a line."""

    def __init__(self, folder: Path):
        self.folder = folder

    def open(self, arguments: dict, step: int) -> None:
        """Claims the folder for as long as this object lives, and writes `run_config.yaml`.

        Lines of steps after `step`, which a stopped run did after its last checkpoint, go: they are done again.

        Raises:
            UserError: it cannot be written, or another run has it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.folder)
            config = {"arguments": arguments, "versions": _versions()}
            (self.folder / "run_config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
            for name in LOGS:
                lines = self.lines(name)
                if lines:
                    kept = [line + "\n" for line in lines if json.loads(line)["step"] <= step]
                    (self.folder / f"{name}.jsonl").write_text("".join(kept), encoding="utf-8")
        except OSError as error:
            raise UserError(f"output_dir {self.folder} cannot be written: {error.strerror}.") from None

    def lines(self, name: str) -> list[str]:
        """Whole lines of a log, the last of which may have been cut off."""
        path = self.folder / f"{name}.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return text[: text.rfind("\n") + 1].splitlines()

    def append(self, name: str, values: dict) -> None:
        """One write of one line, so that processes may share a log; raises `UserError` when there is no room."""
        try:
            with (self.folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.folder / f'{name}.jsonl'} cannot be written: {error.strerror}. Make room, then go on with "
                "--resume_from_checkpoint latest."
            ) from None


def flat(values: dict) -> dict:
    """Settings as trackers take them: members of mappings get dotted names, lists become text."""
    result = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= {f"{key}.{k}": v for k, v in flat(value).items()}
        else:
            result[key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return result


def _versions() -> dict[str, str]:
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets", "tokenizers")}
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {"python": platform.python_version(), **versions, "git": revision.stdout.strip() or "unknown"}
