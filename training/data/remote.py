"""Names of shards: patterns expanded, repositories of the Hub fetched."""

from __future__ import annotations

import glob
import os
import re

from modeling_amorlip.cli_amorlip import UserError


def expand(source: str) -> list[str]:
    """Files that a source names: `{000..123}` and `{a,b}` expanded, `*` matched, a folder of tars listed.

    Raises:
        UserError: a pattern, or a name out of it, that matches no file.
    """
    if source.startswith("hf://"):
        from huggingface_hub import snapshot_download

        kind, owner, name, *path = source.removeprefix("hf://").split("/")
        if kind != "datasets" or not path:
            raise UserError(f"train_data {source}: write hf://datasets/OWNER/NAME/PATTERN.")
        try:
            patterns = _expand_braces("/".join(path))
            folder = snapshot_download(f"{owner}/{name}", repo_type="dataset", allow_patterns=patterns)
        except Exception as error:  # the client raises many kinds
            raise UserError(f"train_data {source} cannot be had: {str(error).strip().splitlines()[0]}") from None
        return [file for pattern in patterns for file in sorted(glob.glob(os.path.join(folder, pattern)))]
    if os.path.isdir(source):
        return sorted(glob.glob(os.path.join(glob.escape(source), "*.tar"))) or [source]
    names = _expand_braces(source)
    found = [match for name in names for match in (sorted(glob.glob(name)) if "*" in name else [name])]
    if names != [source] or "*" in source:
        missing = [name for name in found if not os.path.isfile(name)] or ([] if found else [source])
        if missing:
            raise UserError(f"train_data {source}: there is no {missing[0]} ({len(missing)} missing in all).")
    return found


def _expand_braces(pattern: str) -> list[str]:
    group = re.search(r"\{([^{}]*)\}", pattern)
    if group is None:
        return [pattern]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", group[1]):
        width = len(span[1])
        values = [str(i).zfill(width) for i in range(int(span[1]), int(span[2]) + 1)]
    else:
        values = group[1].split(",")
    before, after = pattern[: group.start()], pattern[group.end() :]
    return [name for value in values for name in _expand_braces(before + value + after)]
