"""Keep the embeddings of a folder's images in a file, and encode only what is new or changed."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eval.apps.image_files import encode_files, find_images
from eval.apps.outputs import check_writable, printable, replacing, unwritable
from modeling_amorlip.cli_amorlip import UserError


FORMAT = "amorlip_image_index"
VERSION = "2"
SAVE_EVERY = 4096
"""Images between two writes of the index, from where an interrupted run continues."""

Stamp = tuple[str, int, int]
"""An image's path below the folder, size in bytes and modification time in nanoseconds."""


def default_index(folder: Path) -> Path:
    """Return the index file beside a folder of images."""
    folder = folder.resolve()
    return folder.parent / f"{folder.name}.index.safetensors"


def index_images(
    model: Any,
    processor: Any,
    folder: Path,
    file: Path,
    model_revision: str | None,
    batch_size: int = 32,
    exclude: Sequence[str] = (),
) -> tuple[list[Path], Tensor]:
    """Return (paths, unit-norm embeddings [I, d]) of a folder's images, and update the index `file`.

    An entry is reused while path, size and modification time of the image, the model's revision and the image
    processor are the same.

    Args:
        model_revision: what identifies the model's weights; with None nothing is reused.
        exclude: patterns of folders to leave out.

    Raises:
        UserError: no image can be read, `file` holds something other than an index, or it cannot be written.
    """
    origin = {"version": VERSION, "revision": str(model_revision)}
    origin["image_processor"] = processor.image_processor.to_json_string()
    stamps = _stamps(folder, find_images(folder, exclude))
    entries = _read_index(file, origin) if model_revision else {}
    embeds = {path: entries[stamp] for path, stamp in stamps.items() if stamp in entries}
    others = _other_entries(folder, entries, stamps)
    missing = [path for path in stamps if path not in embeds]
    print(f"{len(embeds)} images in the index, {len(missing)} to encode", file=sys.stderr)
    if missing:
        _make_parent(file)
        check_writable(file, "--index")
    # Every write rewrites the whole file, so a large index is written less often.
    stride = max(SAVE_EVERY, len(stamps) // 16)
    for start in range(0, len(missing), stride):
        embeds |= encode_files(model, processor, missing[start : start + stride], batch_size)
        _write_index(file, origin, others | {stamps[path]: embed for path, embed in embeds.items()})
    if not embeds:
        raise UserError(f"None of the {len(stamps)} images in {printable(folder)} can be read.")
    paths = sorted(embeds)
    return paths, torch.stack([embeds[path] for path in paths])


def _stamps(folder: Path, paths: Sequence[Path]) -> dict[Path, Stamp]:
    stamps = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # deleted since the folder was read
            status = path.stat()
            stamps[path] = path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns
    return stamps


def _other_entries(folder: Path, entries: dict[Stamp, Tensor], stamps: dict[Path, Stamp]) -> dict[Stamp, Tensor]:
    """Return the entries of images that exist but are left out this time, so that they stay in the index."""
    names = {name for name, _, _ in stamps.values()}
    return {stamp: e for stamp, e in entries.items() if stamp[0] not in names and (folder / stamp[0]).is_file()}


def _make_parent(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(file, "--index", error) from None


def _read_index(file: Path, origin: dict[str, str]) -> dict[Stamp, Tensor]:
    """Return {stamp: embedding [d]}, empty where there is no index or another model made it."""
    if not file.exists():
        return {}
    if not file.is_file():
        raise UserError(f"--index {printable(file)} is not a file; name another.")
    try:
        with safe_open(file, "pt") as index:
            metadata = index.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{printable(file)} is not an index of images; name another file with --index.")
            if any(metadata.get(key) != value for key, value in origin.items()):
                print(f"{printable(file)} was made by another model; encoding all images again", file=sys.stderr)
                return {}
            stamps = json.loads(index.get_tensor("stamps").numpy().tobytes())
            return dict(zip(map(tuple, stamps), index.get_tensor("image_embeds"), strict=True))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{printable(file)} cannot be read ({error}); delete it, or name another with --index."
        ) from None


def _write_index(file: Path, origin: dict[str, str], entries: dict[Stamp, Tensor]) -> None:
    if not entries:
        return
    # A safetensors header holds 100 MB at most, which the names of a million images exceed: they are a tensor too.
    stamps = torch.frombuffer(bytearray(json.dumps(list(entries)).encode("ascii")), dtype=torch.uint8)
    tensors = {"image_embeds": torch.stack(list(entries.values())), "stamps": stamps}
    try:
        with replacing(file) as aside:
            save_file(tensors, aside, metadata={"format": FORMAT, **origin})
    except (SafetensorError, OSError) as error:
        raise unwritable(file, "--index", error) from None
