"""The glyph set, on its miniature of 52 letters in DejaVu."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import unicodedata

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.checkout import ROOT
from training.study import glyph_fonts, glyphs
from training.study.glyph_fonts import miniature_library
from training.study.glyphs import GlyphSetBuilder, GlyphSettings, character_name, draw_glyph


MINIATURE = ROOT / "demo_data/glyphs"
SETTINGS = GlyphSettings(held_out_fraction=0.25, development_fraction=0.5)


@pytest.fixture(scope="module")
def library():
    return miniature_library()


def load(folder, name):
    return datasets.load_dataset("parquet", data_files=str(folder / f"{name}.parquet"), split="train")


def codepoints(members) -> set[int]:
    return {glyph.codepoint for glyph in members}


@pytest.mark.parametrize("character", ["a", "ǎ", "Ж", "ك", "→", "7", "፨", "가", "、"])
def test_named_characters_have_captions(character):
    assert character_name(ord(character)) == unicodedata.name(character).lower()


@pytest.mark.parametrize("codepoint", [0x20, 0xA0, 0x301, 0x4E00, 0xF900, 0x17000, 0x200D, 0xE000, 0x0A])
def test_other_characters_have_none(codepoint):
    """Spaces, marks, ideographs, format, private and control characters."""
    assert character_name(codepoint) is None


@pytest.mark.parametrize("character", "aWl-_|")
def test_glyphs_are_cropped_and_centered(library, character):
    image = np.asarray(Image.open(io.BytesIO(draw_glyph(library.training[0].at(56), character))))
    assert image.shape == (32, 32) and image.dtype == np.uint8
    rows, columns = (np.flatnonzero((image < 255).any(axis)) for axis in (1, 0))
    edges = [(rows[0], 31 - rows[-1]), (columns[0], 31 - columns[-1])]
    assert min(map(min, edges)) == 2  # the longer side has 28 of 32 pixels
    assert all(abs(first - last) <= 1 for first, last in edges)


def test_blank_glyphs_are_skipped(library):
    assert draw_glyph(library.training[0].at(56), " ") is None


def test_splits_are_disjoint(library):
    glyph_set = GlyphSetBuilder(library, SETTINGS).build()
    trained = codepoints(glyph_set.train)
    characters, development = (codepoints(glyph_set.evaluation[f"characters{end}"]) for end in ("", "_development"))
    assert not trained & characters and not trained & development and not characters & development
    assert trained | characters | development == glyph_fonts.MINIATURE_CHARACTERS
    for name in ("libertine", "junicode", "unifont"):
        assert codepoints(glyph_set.evaluation[name]) == trained
    faces = {name: {glyph.face for glyph in members} for name, members in glyph_set.evaluation.items()}
    faces["train"] = {glyph.face for glyph in glyph_set.train}
    assert faces["characters"] <= faces["train"] and not faces["train"] & faces["libertine"]
    assert all(face.is_regular for face in faces["train"])


def test_seed_decides_the_set(library):
    first, again, other = (
        GlyphSetBuilder(library, dataclasses.replace(SETTINGS, seed=seed)).build() for seed in (0, 0, 1)
    )
    assert first == again and codepoints(first.train) != codepoints(other.train)


def test_fonts_per_character_limits_images(library):
    glyph_set = GlyphSetBuilder(library, dataclasses.replace(SETTINGS, fonts_per_character=1)).build()
    assert len(glyph_set.train) == len(codepoints(glyph_set.train))


def test_further_faces_leave_evaluation_sets_unchanged(library):
    standard, larger = (
        GlyphSetBuilder(library, dataclasses.replace(SETTINGS, all_faces=all_faces)).build()
        for all_faces in (False, True)
    )
    assert standard.evaluation == larger.evaluation and len(larger.train) == 3 / 2 * len(standard.train)
    assert codepoints(standard.train) == codepoints(larger.train)


def test_hangul_syllables_are_trained_on_only(library):
    """With a face that claims one, since no font here has Hangul."""
    face = dataclasses.replace(library.training[0], codepoints=frozenset([ord("가")]))
    with_hangul = dataclasses.replace(library, hangul=[face])
    standard, larger = (GlyphSetBuilder(some, SETTINGS).build() for some in (library, with_hangul))
    assert standard.evaluation == larger.evaluation
    assert codepoints(larger.train) - codepoints(standard.train) == {ord("가")}
    assert character_name(ord("가")) == "hangul syllable ga"


def test_identical_images_are_drawn_once(library):
    face = library.training[0]
    copy = dataclasses.replace(face, family="copy")
    glyph_set = GlyphSetBuilder(dataclasses.replace(library, training=[face, copy]), SETTINGS).build()
    assert len(glyph_set.train) == len(codepoints(glyph_set.train))


def test_command_line_rebuilds_committed_miniature(monkeypatch, tmp_path, capsys):
    """Names, splits and labels are equal; pixels may differ by the version of FreeType."""
    monkeypatch.setattr(sys, "argv", ["glyphs.py", str(tmp_path), "--miniature"])
    assert glyphs.main() == 0
    assert "glyphs_train.parquet: 80 images of 40 characters" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in MINIATURE.iterdir()} - {"README.md"}
    built, committed = load(tmp_path, "glyphs_train"), load(MINIATURE, "glyphs_train")
    assert built.remove_columns("image")[:] == committed.remove_columns("image")[:]
    for name in ("characters", "characters_development", "libertine", "junicode", "unifont"):
        built, committed = load(tmp_path, f"glyphs_{name}"), load(MINIATURE, f"glyphs_{name}")
        assert built.features == committed.features and built["label"] == committed["label"]
        texts = json.loads((MINIATURE / f"glyphs_{name}.json").read_text())
        assert texts == {"classes": built.features["label"].names, "templates": ["{}"]}
    about, committed = (json.loads((folder / "glyphs.json").read_text()) for folder in (tmp_path, MINIATURE))
    assert about["sets"] == committed["sets"] and about["settings"] == committed["settings"]
    assert all(face["license"] == "Bitstream Vera" for face in about["faces"]) and len(about["faces"]) == 5


def test_tasks_name_the_files_of_the_set():
    tasks = yaml.safe_load((ROOT / "training/study/glyphs_tasks.yaml").read_text())
    for task in tasks.values():
        assert (MINIATURE / task["data"]).is_file() and (MINIATURE / task["texts"]).is_file()


def test_missing_packages_are_named(monkeypatch):
    def query(*arguments):
        return "" if arguments[-1] in ("fonts-symbola", "fonts-junicode") else "installed 1.0"

    monkeypatch.setattr(glyph_fonts, "_dpkg_query", query)
    with pytest.raises(UserError, match="apt-get install fonts-symbola fonts-junicode$"):
        glyph_fonts.installed_library(hangul=False)


def test_hangul_needs_its_packages(monkeypatch):
    monkeypatch.setattr(
        glyph_fonts, "_dpkg_query", lambda *arguments: "" if arguments[-1] == "fonts-nanum" else "installed 1.0"
    )
    with pytest.raises(UserError, match="apt-get install fonts-nanum$"):
        glyph_fonts.installed_library(hangul=True)


def test_fonts_per_character_must_be_positive():
    with pytest.raises(UserError, match="--fonts_per_character must be at least 1, got 0"):
        GlyphSettings(fonts_per_character=0)
