"""Fetch data from repositories of the Hub."""

from __future__ import annotations

import glob
import os

from huggingface_hub import snapshot_download

from modeling_amorlip.cli_amorlip import UserError
from training.data.patterns import expand_braces


def is_remote(source: str) -> bool:
    """Return whether an entry of `train_data` lies elsewhere."""
    return source.startswith("hf://")


def download(source: str) -> list[str]:
    """Download files of a data set repository and return their local names."""
    kind, owner, name, *path = source.removeprefix("hf://").split("/")
    if kind != "datasets" or not path:
        raise UserError(f"train_data {source}: write hf://datasets/OWNER/NAME/PATTERN.")
    patterns = expand_braces("/".join(path))
    try:
        folder = snapshot_download(f"{owner}/{name}", repo_type="dataset", allow_patterns=patterns)
    except Exception as error:  # the client raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"train_data {source} cannot be downloaded: {reason}") from None
    return [file for pattern in patterns for file in sorted(glob.glob(os.path.join(folder, pattern)))]
