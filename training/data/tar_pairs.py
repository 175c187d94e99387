"""Group the members of a tar into image-text pairs, with a reason for every member that is left out."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from modeling_amorlip.images_amorlip import IMAGE_EXTENSIONS as DECODABLE_EXTENSIONS
from training.data.tar import LINK_TYPES, TarMember, printable


PREFERRED_IMAGES = ("jpg", "jpeg", "png", "webp")
OTHER_IMAGES = {extension.removeprefix(".") for extension in DECODABLE_EXTENSIONS} - set(PREFERRED_IMAGES)
IMAGE_EXTENSIONS = (*PREFERRED_IMAGES, *sorted(OTHER_IMAGES))
"""Extensions of images, in order of preference where a pair has several."""
CLASS_EXTENSION = "cls"
TEXT_EXTENSIONS = ("txt", "text", "caption", CLASS_EXTENSION)
JSON_EXTENSION = "json"
EXTENSIONS = {*IMAGE_EXTENSIONS, *TEXT_EXTENSIONS, JSON_EXTENSION}

NO_CAPTION, NO_IMAGE = "images without a caption", "captions without an image"
BESIDE_PAIR = "further images of a pair"
FURTHER_KINDS = "members of a pair in a second format"
AMBIGUOUS = "ambiguous members of repeated keys"
PRIVATE = "private members of other tools"
OUTSIDE_LINKS = "links to files outside the archive"
MAX_LINKS = 40


@dataclass(frozen=True, slots=True)
class Part:
    """One member of a pair: where its content lies."""

    extension: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class TarPair:
    """The members of one pair."""

    key: str
    image: Part
    text: Part | None
    json: Part | None


@dataclass
class TarContents:
    """The pairs of a tar, in the order of their first members, and what is not part of a pair.

    Attributes:
        ignored: number of members left out, by cause.
        repeated_keys: number of keys that occur more than once.
    """

    pairs: list[TarPair] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    repeated_keys: int = 0


def split_name(name: str) -> tuple[str, str]:
    """Return the key of a member and its extension in lower case.

    As in webdataset, the extension begins at the first dot of the base name. If that is no extension of an image or a
    caption, it begins at the last dot, so that keys may contain dots: `photo.v1.jpg` has the key `photo.v1`.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if extension.lower() not in EXTENSIONS and base.rpartition(".")[2].lower() in EXTENSIONS:
        stem, _, extension = base.rpartition(".")
    return folder + slash + stem, extension.lower()


def group_members(members: Iterable[TarMember]) -> TarContents:
    """Group members into pairs by their keys, wherever they lie.

    A key that occurs again starts another pair. A dotted name that is incomplete on its own joins the members with the
    key before its first dot (`photo.jpg` and `photo.jpg.txt`).
    """
    contents = TarContents()
    by_key: dict[str, list[Part]] = {}
    for key, part in _classify(_normalize(members), contents.ignored):
        by_key.setdefault(key, []).append(part)
    groups: dict[str, list[dict[str, Part]]] = {}
    for key, parts in by_key.items():
        occurrences = _split_occurrences(parts)
        if len(occurrences) > 1:
            contents.repeated_keys += 1
            if _is_ambiguous(occurrences):
                contents.ignored[AMBIGUOUS] += len(parts)
                continue
        groups[key] = occurrences
    _join_dotted_names(groups, contents.ignored)
    for key, occurrences in groups.items():
        for parts_by_extension in occurrences:
            pair = _make_pair(key, parts_by_extension, contents.ignored)
            if pair is not None:
                contents.pairs.append(pair)
    return contents


def _normalize(members: Iterable[TarMember]) -> dict[int, tuple[str, TarMember]]:
    """Return members and their names without a leading `./`, numbered in order."""
    result = {}
    for number, member in enumerate(members):
        name = member.name.replace("/./", "/")
        while name.startswith("./"):
            name = name[2:].lstrip("/")
        result[number] = (name, member)
    return result


def _classify(members: dict[int, tuple[str, TarMember]], ignored: Counter[str]) -> Iterable[tuple[str, Part]]:
    """Yield (key, part) of each member that can be part of a pair, and count the others by cause."""
    links = LINK_TYPES.decode()
    targets: dict[str, list[int]] = {}
    if any(member.type in links for _, member in members.values()):
        for number, (name, _) in members.items():
            targets.setdefault(posixpath.normpath(name), []).append(number)
    for number, (name, member) in members.items():
        if member.type == "5":
            ignored["folders"] += 1
        elif _is_private(name):
            ignored[PRIVATE] += 1
        elif (key_and_extension := split_name(name))[1] not in EXTENSIONS:
            extension = printable(posixpath.splitext(name)[1].lower())
            ignored[f"{extension} members" if extension else "members without an extension"] += 1
        elif (content := _follow_links(number, members, targets)) is None:
            ignored[OUTSIDE_LINKS] += 1
        elif content.type != "0":
            ignored["sparse files" if content.type == "S" else "special files"] += 1
        else:
            key, extension = key_and_extension
            yield key, Part(extension, content.offset, content.size)


def _is_private(name: str) -> bool:
    """Return whether a member belongs to a tool: hidden files such as `._photo.jpg`, `__index__`, `PaxHeaders`."""
    folders = name.split("/")
    return any(
        (folder.startswith(".") and folder not in (".", ".."))
        or (folder.startswith("__") and folder.endswith("__"))
        or folder == "__MACOSX"
        or folder.startswith("PaxHeader")
        for folder in folders
    )


def _follow_links(
    number: int, members: dict[int, tuple[str, TarMember]], targets: dict[str, list[int]]
) -> TarMember | None:
    """Return the member that a link leads to, and a member that is no link itself; None if that is not in the archive.

    A hard link leads to the last member of that name before it, a symbolic link to the last one in the archive.
    """
    for _ in range(MAX_LINKS):
        name, member = members[number]
        if member.type == "1":
            candidates = [n for n in targets.get(posixpath.normpath(member.target), ()) if n < number]
        elif member.type == "2":
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.target))
            candidates = targets.get(target, [])
        else:
            return member
        if not candidates:
            return None
        number = candidates[-1]
    return None


def _split_occurrences(parts: list[Part]) -> list[dict[str, Part]]:
    """Split the members of a key where an extension occurs again."""
    occurrences: list[dict[str, Part]] = [{}]
    for part in parts:
        if part.extension in occurrences[-1]:
            occurrences.append({})
        occurrences[-1][part.extension] = part
    return occurrences


def _has_image(parts: dict[str, Part]) -> bool:
    return any(extension in IMAGE_EXTENSIONS for extension in parts)


def _has_caption(parts: dict[str, Part]) -> bool:
    return any(extension not in IMAGE_EXTENSIONS for extension in parts)


def _is_ambiguous(occurrences: list[dict[str, Part]]) -> bool:
    """Return whether a caption could belong to several images: some occurrences lack one, others the other."""
    return not all(map(_has_image, occurrences)) and not all(map(_has_caption, occurrences))


def _join_dotted_names(groups: dict[str, list[dict[str, Part]]], ignored: Counter[str]) -> None:
    """Join incomplete dotted names with the incomplete members of the key before their first dot, in place."""
    dotted: dict[str, list[str]] = {}
    for key, occurrences in groups.items():
        folder, slash, base = key.rpartition("/")
        stem = folder + slash + base.partition(".")[0]
        is_complete = len(occurrences) == 1 and _has_image(occurrences[0]) and _has_caption(occurrences[0])
        if stem != key and stem in groups and len(occurrences) == 1 and not is_complete:
            dotted.setdefault(stem, []).append(key)
    for stem, keys in dotted.items():
        if len(groups[stem]) != 1:
            continue
        base_parts = groups[stem][0]
        if _has_image(base_parts) and _has_caption(base_parts):
            images = [key for key in keys if _has_image(groups[key][0])]
            for key in images:
                ignored[BESIDE_PAIR] += len(groups.pop(key)[0])
            continue
        lacks = _has_image if _has_caption(base_parts) else _has_caption
        claimants = [key for key in keys if lacks(groups[key][0])]
        if len(claimants) == 1:
            base_parts.update(groups.pop(claimants[0])[0])


def _make_pair(key: str, parts: dict[str, Part], ignored: Counter[str]) -> TarPair | None:
    """Return the pair that members of one key form; None if the image or the caption is missing."""
    image = next((parts[name] for name in IMAGE_EXTENSIONS if name in parts), None)
    json = parts.get(JSON_EXTENSION)
    # The number of a class is no caption where there may be a better one.
    texts = [name for name in TEXT_EXTENSIONS if name in parts and not (name == CLASS_EXTENSION and json)]
    text = parts[texts[0]] if texts else None
    if image is None or (text is None and json is None):
        ignored[NO_IMAGE if image is None else NO_CAPTION] += len(parts)
        return None
    if further := len(parts) - sum(part is not None for part in (image, text, json)):
        ignored[FURTHER_KINDS] += further
    return TarPair(key, image, text, json)
