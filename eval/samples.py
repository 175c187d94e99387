"""Samples of tasks, from the rows of a table or the members of a tar; what a sample lacks is said with its name."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from eval.tables import image_source
from eval.tasks import Task
from modeling_amorlip.cli_amorlip import UserError
from modeling_amorlip.images_amorlip import IMAGE_EXTENSIONS, convert_to_rgb, open_image


MAX_IMAGE_PIXELS = 178_956_970  # Pillow's own limit
MAX_REASON = 200  # characters; a path that is data in base64 would fill the screen


@dataclass
class Sample:
    """Undecoded images with what the task knows of them.

    An instance of WinoGAViL has several images, its prompt as the only caption, and the right images' places.
    """

    key: str
    images: list[bytes | str]
    label: int = -1
    captions: list[str] = field(default_factory=list)
    metadata: np.ndarray | None = None
    associations: list[int] = field(default_factory=list)

    def decode(self) -> list[Image.Image]:
        """Return the images in RGB; raise whatever Pillow raises for data that is no image."""
        return [convert_to_rgb(open_image(image, MAX_IMAGE_PIXELS)) for image in self.images]


def describe_image_error(error: Exception) -> str:
    """Return why an image cannot be decoded, on one line that is the same in every process."""
    if isinstance(error, UnidentifiedImageError):  # its message holds an address in memory
        return "it is not an image, or in a format that the decoder does not know"
    reason = " ".join(str(error).split()) or type(error).__name__
    return reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]}..."


def sample_of_row(task: Task, key: str, row: dict[str, Any], labels: dict[Any, int] | None) -> Sample:
    """Return the sample in a row of a task's table.

    Args:
        labels: Class numbers of labels that are not class numbers themselves.

    Raises:
        UserError: A value of the row is not what the task needs.
    """
    where = f"{task.name}: {key}"
    if task.kind == "winogavil":
        return _instance_of_row(where, key, row)
    image = image_source(row[task.image_column], where)
    if task.kind == "retrieval":
        return Sample(key, [image], captions=_captions(where, row["caption"]))
    label = row[task.label_column]
    if labels is not None:
        if label not in labels:
            raise UserError(f"{where}: its label {label!r} is none of the {len(labels)} classes.")
        label = labels[label]
    if not isinstance(label, int):  # of a ClassLabel, which may be missing
        raise UserError(f"{where}: its label is {label!r}, not a class number.")
    return Sample(key, [image], label=label)


def _captions(where: str, value: Any) -> list[str]:
    """Return the captions of a text or a list of texts, without blank and missing ones."""
    values = value if isinstance(value, list) else [value]
    wrong = [v for v in values if v is not None and not isinstance(v, str)]
    if wrong:
        raise UserError(f"{where}: its caption is {str(wrong[0])[:60]!r}; captions must be a text or a list of texts.")
    return [caption for caption in values if caption and caption.strip()]


def _instance_of_row(where: str, key: str, row: dict[str, Any]) -> Sample:
    candidates, associations, cue = row["candidates"] or [], row["associations"], row["cue"]
    images = [image_source(value, where) for value in row["candidates_images"] or []]
    if not isinstance(associations, list) or not associations or not set(associations) <= set(candidates):
        raise UserError(f"{where}: its associations {associations!r} must be some of its candidates {candidates!r}.")
    if len(images) != len(candidates):
        raise UserError(f"{where}: it has {len(images)} images for its candidates {candidates!r}; give one for each.")
    if not isinstance(cue, str) or not cue.strip():
        raise UserError(f"{where}: its cue is {cue!r}, not a text.")
    chosen = [place for place, name in enumerate(candidates) if name in associations]
    return Sample(key, images, captions=[winogavil_prompt(cue)], associations=chosen)


def winogavil_prompt(cue: str) -> str:
    """Return "A cue" or "An cue", as DataComp's evaluation of WinoGAViL words it."""
    cue = cue.lower()
    return f"{'An' if cue[0] in 'aeiou' else 'A'} {cue}"


def sample_of_members(where: str, members: dict[str, bytes]) -> Sample:
    """Return a sample from the members of a tar; raise `UserError` for a missing image or a wrong label."""
    image = next((content for extension, content in members.items() if f".{extension}" in IMAGE_EXTENSIONS), None)
    if image is None:
        raise UserError(f"{where}: the sample has no image ({', '.join(members)}).")
    try:
        label = int(members.get("cls", b"-1"))
        captions = members.get("txt", b"").decode("utf-8").split("\n")
        metadata = np.load(io.BytesIO(members["npy"]), allow_pickle=False) if "npy" in members else None
        metadata = None if metadata is None else metadata.astype(np.float64).ravel()
    except ValueError as error:  # UnicodeDecodeError is one
        raise UserError(f"{where}: the sample cannot be read: {error}") from None
    return Sample(where, [image], label, [line for line in captions if line.strip()], metadata)
