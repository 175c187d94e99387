"""Names of shards: expand patterns and fetch repositories of the Hub."""

from __future__ import annotations

import glob
import os
import re

from huggingface_hub import snapshot_download

from modeling_amorlip.cli_amorlip import UserError


def expand(source: str) -> list[str]:
    """Return the files that a source names.

    `{000..123}` and `{a,b}` are expanded and `*` is matched. A folder that holds tars stands for them, and files of
    `hf://datasets/OWNER/NAME/PATTERN` are downloaded. Any other name is returned as it is.

    Raises:
        UserError: a pattern, or a name that it expands to, matches no file.
    """
    if source.startswith("hf://"):
        return _download(source)
    if os.path.isdir(source):
        return sorted(glob.glob(os.path.join(glob.escape(source), "*.tar"))) or [source]
    names = expand_braces(source)
    files = [file for name in names for file in (sorted(glob.glob(name)) if "*" in name else [name])]
    if names != [source] or "*" in source:
        missing = [file for file in files if not os.path.isfile(file)] or ([] if files else [source])
        if missing:
            raise UserError(f"train_data {source}: there is no {missing[0]} ({len(missing)} missing in all).")
    return files


def expand_braces(pattern: str) -> list[str]:
    """Return the names that the groups `{000..123}` and `{a,b}` of a pattern stand for."""
    group = re.search(r"\{([^{}]*)\}", pattern)
    if group is None:
        return [pattern]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", group[1]):
        width = len(span[1])
        values = [str(i).zfill(width) for i in range(int(span[1]), int(span[2]) + 1)]
    else:
        values = group[1].split(",")
    before, after = pattern[: group.start()], pattern[group.end() :]
    return [name for value in values for name in expand_braces(before + value + after)]


def _download(source: str) -> list[str]:
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
