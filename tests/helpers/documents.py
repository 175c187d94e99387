"""Read the Markdown documents: code blocks, shell commands, links and mentioned paths."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.checkout import ROOT


DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("demo_data/*/README.md"), *ROOT.glob("model_cards/*.md")]
)
FLOORS = ("modeling_amorlip", "eval", "training", "docs", "demo_data", "model_cards", "tests", ".ci", ".github")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SEPARATOR = re.compile(r"[;&|\n]+")


@dataclass(frozen=True)
class Block:
    """A fenced code block; `heading` is the nearest heading above it."""

    document: str
    heading: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}: {self.heading}"


def read_blocks(language: str) -> list[Block]:
    """Return every fenced block of a language, in the order of the documents."""
    blocks = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text[: match.start()]), re.MULTILINE)
            heading = headings[-1] if headings else ""
            if match[1] == language:
                blocks.append(Block(path.relative_to(ROOT).as_posix(), heading, language, match[2]))
    return blocks


def split_commands(text: str) -> list[list[str]]:
    """Return the commands of a shell block as lists of words, without loops, comments and assignments."""
    text = re.sub(r"(^|\s)#.*$", r"\1", text.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    commands: list[list[str]] = [[]]
    for word in lexer:
        if _SEPARATOR.fullmatch(word):
            commands.append([])
        else:
            commands[-1].append(word)
    return [words for command in commands if (words := _strip_control(command))]


def _strip_control(command: list[str]) -> list[str]:
    while command and (command[0] == "do" or re.fullmatch(r"[A-Z_]+=\S*", command[0])):
        command = command[1:]
    return [] if command and command[0] in ("for", "done") else command


def read_links(path: Path) -> list[str]:
    """Return the relative targets of a document's links and images."""
    text = _FENCE.sub("", path.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    # The links of model cards lead to files of the published repository.
    is_card = path.parent.name == "model_cards"
    return [target for target in targets if "://" not in target and not is_card]


def read_anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub makes of a document's headings."""
    text = _FENCE.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def read_paths(path: Path) -> set[str]:
    """Return the paths of the repository that a document mentions; capitals such as NAME are placeholders."""
    names = "|".join(map(re.escape, FLOORS))
    found = re.findall(rf"(?<![\w./@-])((?:{names})/[\w./*+-]*)", path.read_text(encoding="utf-8"))
    return {name.rstrip(".") for name in found if not re.search(r"(^|/)[A-Z]{2,}(?!\w)", name.replace("README", ""))}
