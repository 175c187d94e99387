"""Fetch tasks' data from the Hub."""

from __future__ import annotations

import sys
from pathlib import Path

from eval.tasks import Task
from modeling_amorlip.cli_amorlip import UserError


def download(tasks: list[Task], data_dir: Path) -> None:
    """Fetch tasks' repositories from the Hub into `data_dir`; files that are there already are not fetched again.

    Raises:
        UserError: None of a task's repositories can be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for task in tasks:
        if not task.repositories:
            raise UserError(f"Task {task.name} has no repository to download: it reads {task.data}.")
        for repository in task.repositories:
            folder = data_dir / repository.split("/")[-1]
            try:
                snapshot_download(repository, repo_type="dataset", local_dir=folder)
            except (
                HfHubHTTPError,
                OfflineModeIsEnabled,
                OSError,
                ValueError,
            ) as error:  # ValueError: unsafe names
                reason = str(error).strip().splitlines()[0]
                print(f"{task.name}: {repository} cannot be downloaded: {reason}", file=sys.stderr)
                continue
            print(f"{task.name}: {folder}")
            break
        else:
            raise UserError(f"Task {task.name}: none of {', '.join(task.repositories)} could be downloaded.")
