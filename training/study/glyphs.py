"""Build the glyph set: images of characters in many fonts, captioned with their Unicode names.

    apt-get install fonts-freefont-ttf fonts-dejavu-core fonts-dejavu-extra fonts-noto-core fonts-noto-extra \\
        fonts-symbola fonts-linuxlibertine fonts-junicode fonts-unifont
    python training/study/glyphs.py DATA
    python training/study/glyphs.py DATA --all_faces --fonts_per_character 40 --hangul     # more training pairs
    python training/study/glyphs.py demo_data/glyphs --miniature

DATA receives, each parquet file of classes with a JSON file of class names and templates:

- glyphs_train.parquet: image, caption (the name in lower case), character, face, license. `character` is the group
  column: pairs with the same value are the same character in several fonts.
- glyphs_characters, glyphs_characters_development: characters that are never trained on, in training fonts.
- glyphs_libertine, glyphs_junicode, glyphs_unifont: trained characters in fonts that are never trained on.
- glyphs.json: settings, versions, and every face with its license.

The set holds all named characters except ideographs, Hangul syllables, marks and spaces. A glyph is drawn at 56 pixels,
cropped, scaled to 28 pixels and centered on 32 x 32 pixels. Whether a character is held out depends on the seed and its
code point alone, and the evaluation sets are the same with every option that adds training pairs. The same seed, font
versions and Pillow version give the same files.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import random
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets
import PIL
from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

from modeling_amorlip.cli_amorlip import UserError, cli_entry_point
from training.study.glyph_fonts import Face, FontLibrary, installed_library, miniature_library


FONT_SIZE, GLYPH_SIZE, IMAGE_SIZE = 56, 28, 32
EVALUATION_FONTS = 4
TRAIN_FEATURES = datasets.Features(
    {"image": datasets.Image(), **{n: datasets.Value("string") for n in ("caption", "character", "face", "license")}}
)


@dataclass(frozen=True)
class GlyphSettings:
    """What a glyph set contains; see the command line's help."""

    seed: int = 0
    fonts_per_character: int = 4
    all_faces: bool = False
    hangul: bool = False
    held_out_fraction: float = 0.1  # of the characters
    development_fraction: float = 0.1  # of the held-out characters

    def __post_init__(self) -> None:
        if self.fonts_per_character < 1:
            raise UserError(f"--fonts_per_character must be at least 1, got {self.fonts_per_character}.")

    def draw(self, codepoint: int, purpose: str) -> random.Random:
        """Return a generator that depends on the seed, the character and the purpose alone."""
        return random.Random(f"{self.seed}/{codepoint}/{purpose}")

    def split(self, codepoint: int) -> str:
        """Return "train", "report" or "development"."""
        if self.draw(codepoint, "held out").random() >= self.held_out_fraction:
            return "train"
        return "development" if self.draw(codepoint, "development").random() < self.development_fraction else "report"


@dataclass(frozen=True)
class Glyph:
    """One image of a character, as PNG."""

    codepoint: int
    face: Face
    png: bytes


def character_name(codepoint: int) -> str | None:
    """Return the Unicode name in lower case, or None for characters without one, ideographs, marks and spaces."""
    character = chr(codepoint)
    name = unicodedata.name(character, "")
    if not name or "IDEOGRAPH-" in name or unicodedata.category(character)[0] in "MZC":
        return None
    return name.lower()


def is_hangul_syllable(codepoint: int) -> bool:
    """Return whether a character is a precomposed Hangul syllable."""
    return 0xAC00 <= codepoint <= 0xD7A3


def draw_glyph(font: ImageFont.FreeTypeFont, character: str) -> bytes | None:
    """Return a glyph as a PNG of 32 x 32 pixels, black on white, or None if the glyph is blank."""
    left, top, right, bottom = font.getbbox(character)
    canvas = Image.new("L", (max(1, int(right - left)) + 2, max(1, int(bottom - top)) + 2), 255)
    ImageDraw.Draw(canvas).text((1 - left, 1 - top), character, fill=0, font=font)
    box = canvas.point(lambda value: 255 - value).getbbox()
    if box is None:
        return None
    glyph = canvas.crop(box)
    scale = GLYPH_SIZE / max(glyph.size)
    size = [max(1, round(length * scale)) for length in glyph.size]
    glyph = glyph.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    image = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 255)
    image.paste(glyph, ((IMAGE_SIZE - size[0]) // 2, (IMAGE_SIZE - size[1]) // 2))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


class GlyphDrawer:
    """Draws characters in a random selection of faces."""

    def __init__(self, faces: Iterable[Face], settings: GlyphSettings) -> None:
        self.settings = settings
        self.fonts = {face: font for face in faces if (font := face.at(FONT_SIZE)) is not None}
        self.faces_of: dict[int, list[Face]] = {}
        for face in sorted(self.fonts, key=lambda face: face.name):
            for codepoint in face.codepoints:
                self.faces_of.setdefault(codepoint, []).append(face)

    def draw(self, codepoint: int, number: int) -> Iterator[Glyph]:
        """Yield up to `number` different images of a character, each in another face."""
        faces = list(self.faces_of.get(codepoint, ()))
        self.settings.draw(codepoint, "faces").shuffle(faces)
        images: set[bytes] = set()
        for face in faces:
            if len(images) == number:
                return
            png = draw_glyph(self.fonts[face], chr(codepoint))
            if png is not None and png not in images:
                images.add(png)
                yield Glyph(codepoint, face, png)


@dataclass
class GlyphSet:
    """Training pairs, and evaluation sets by name."""

    train: list[Glyph] = field(default_factory=list)
    evaluation: dict[str, list[Glyph]] = field(default_factory=dict)


class GlyphSetBuilder:
    """Draws the training pairs and evaluation sets from a library of faces."""

    def __init__(self, library: FontLibrary, settings: GlyphSettings) -> None:
        self.settings = settings
        self.standard = GlyphDrawer(_regular(library.training), settings)
        self.training = GlyphDrawer(library.training, settings) if settings.all_faces else self.standard
        self.hangul = GlyphDrawer(library.hangul if settings.all_faces else _regular(library.hangul), settings)
        self.held_out = {name: GlyphDrawer(faces, settings) for name, faces in library.held_out.items()}

    def build(self) -> GlyphSet:
        """Return all glyphs, ordered by code point."""
        glyphs = GlyphSet(evaluation={name: [] for name in ("characters", "characters_development", *self.held_out)})
        codepoints = sorted(self.standard.faces_of.keys() | self.hangul.faces_of.keys())
        for codepoint in tqdm(codepoints, desc="characters", disable=None):
            if character_name(codepoint) is None:
                continue
            if is_hangul_syllable(codepoint):
                glyphs.train += self.hangul.draw(codepoint, self.settings.fonts_per_character)
            elif codepoint in self.standard.faces_of:
                self._add(codepoint, glyphs)
        return glyphs

    def _add(self, codepoint: int, glyphs: GlyphSet) -> None:
        """Add a character's images to the sets that it belongs to."""
        split = self.settings.split(codepoint)
        if split != "train":
            name = "characters" if split == "report" else "characters_development"
            glyphs.evaluation[name] += self.standard.draw(codepoint, EVALUATION_FONTS)
            return
        pairs = list(self.training.draw(codepoint, self.settings.fonts_per_character))
        glyphs.train += pairs
        if pairs:
            for name, drawer in self.held_out.items():
                glyphs.evaluation[name] += drawer.draw(codepoint, 1)


def _regular(faces: list[Face]) -> list[Face]:
    return [face for face in faces if face.is_regular]


def write_train(glyphs: list[Glyph], path: Path) -> None:
    """Write pairs in the layout that `train_data` reads."""
    rows = (
        {
            "image": {"bytes": glyph.png, "path": None},
            "caption": character_name(glyph.codepoint),
            "character": f"U+{glyph.codepoint:04X}",
            "face": glyph.face.name,
            "license": glyph.face.license,
        }
        for glyph in glyphs
    )
    datasets.Dataset.from_list(list(rows), features=TRAIN_FEATURES).to_parquet(path)


def write_classes(glyphs: list[Glyph], path: Path) -> None:
    """Write an image-classification set with one class per character, and its class names and templates as JSON."""
    codepoints = sorted({glyph.codepoint for glyph in glyphs})
    classes = [character_name(codepoint) for codepoint in codepoints]
    label_of = {codepoint: label for label, codepoint in enumerate(codepoints)}
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    rows = [{"image": {"bytes": glyph.png, "path": None}, "label": label_of[glyph.codepoint]} for glyph in glyphs]
    datasets.Dataset.from_list(rows, features=columns).to_parquet(path)
    texts = {"classes": classes, "templates": ["{}"]}
    path.with_suffix(".json").write_text(json.dumps(texts, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def describe(glyphs: GlyphSet, library: FontLibrary, settings: GlyphSettings) -> dict[str, Any]:
    """Return what the set was made from: settings, versions, sizes, and the faces in use with their licenses."""
    sets = {"train": glyphs.train, **glyphs.evaluation}
    images = Counter(glyph.face for members in sets.values() for glyph in members)
    fields = ("name", "family", "style", "version", "package", "package_version", "license")
    return {
        "settings": dataclasses.asdict(settings),
        "versions": {
            "unicode": unicodedata.unidata_version,
            "pillow": PIL.__version__,
            "freetype": features.version("freetype2"),
        },
        "sets": {
            name: {"images": len(members), "characters": len({glyph.codepoint for glyph in members})}
            for name, members in sets.items()
        },
        "faces": [
            {**{field: getattr(face, field) for field in fields}, "images": images[face]}
            for face in library.all_faces()
            if images[face]
        ],
    }


def write(glyphs: GlyphSet, library: FontLibrary, settings: GlyphSettings, folder: Path) -> None:
    """Write all files of the set and print its sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_train(glyphs.train, folder / "glyphs_train.parquet")
    for name, members in glyphs.evaluation.items():
        write_classes(members, folder / f"glyphs_{name}.parquet")
    about = describe(glyphs, library, settings)
    (folder / "glyphs.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    for name, size in about["sets"].items():
        print(f"glyphs_{name}.parquet: {size['images']} images of {size['characters']} characters")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, metavar="DATA", help="folder for the files")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of held-out characters and choice of faces (default: 0)"
    )
    parser.add_argument(
        "--fonts_per_character", type=int, default=4, help="maximum training images per character (default: 4)"
    )
    parser.add_argument(
        "--all_faces", action="store_true", help="also train on bold, italic, light and condensed faces"
    )
    parser.add_argument("--hangul", action="store_true", help="also train on Hangul syllables")
    parser.add_argument(
        "--miniature", action="store_true", help="52 letters in DejaVu faces that Matplotlib ships, for tests"
    )
    return parser.parse_args()


@cli_entry_point
def main() -> None:
    """Build the glyph set as the command line says."""
    arguments = parse_arguments()
    datasets.disable_progress_bars()
    settings = GlyphSettings(
        seed=arguments.seed,
        fonts_per_character=arguments.fonts_per_character,
        all_faces=arguments.all_faces,
        hangul=arguments.hangul,
        held_out_fraction=0.25 if arguments.miniature else 0.1,
        development_fraction=0.5 if arguments.miniature else 0.1,
    )
    library = miniature_library() if arguments.miniature else installed_library(settings.hangul)
    write(GlyphSetBuilder(library, settings).build(), library, settings, arguments.output_dir)


if __name__ == "__main__":
    sys.exit(main())
