"""Fonts of the glyph set: which packages it needs, and the faces and characters that they hold."""

from __future__ import annotations

import dataclasses
import io
import string
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import matplotlib
from fontTools.ttLib import TTFont, TTLibError
from PIL import ImageFont

from modeling_amorlip.cli_amorlip import UserError


TRAINING_PACKAGES = {
    "fonts-freefont-ttf": "GPL-3+ with font exception",
    "fonts-dejavu-core": "Bitstream Vera",
    "fonts-dejavu-extra": "Bitstream Vera",
    "fonts-noto-core": "OFL-1.1",
    "fonts-noto-extra": "OFL-1.1",
    "fonts-symbola": "free for any use",
}
"""Debian packages of training fonts, and the licenses of the fonts."""
HANGUL_PACKAGES = {"fonts-nanum": "OFL-1.1", "fonts-unfonts-core": "GPL-2"}
HELD_OUT_FONTS = {
    "libertine": ("fonts-linuxlibertine", "GPL-2+ with font exception, or OFL-1.1", ("LinLibertine_R.otf",)),
    "junicode": ("fonts-junicode", "OFL-1.1", ("JunicodeTwoBeta-Regular.otf",)),
    "unifont": ("fonts-unifont", "GPL-2+ with font exception", ("unifont.otf",)),
}
"""Fonts that are never trained on, by the name of their set: package, license and files."""
UPRIGHT_STYLES = ("Regular", "Book")
FONT_SUFFIXES = (".ttf", ".otf")
MINIATURE_CHARACTERS = frozenset(map(ord, string.ascii_letters))
MINIATURE_LICENSE = "Bitstream Vera"
MINIATURE_TRAINING = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSans-Bold.ttf")
MINIATURE_HELD_OUT = {
    "libertine": "DejaVuSansMono.ttf",
    "junicode": "DejaVuSerif-Italic.ttf",
    "unifont": "DejaVuSansMono-Bold.ttf",
}
"""Faces that stand in for the held-out fonts in the miniature."""


@dataclass(frozen=True)
class Face:
    """One font file with what identifies it; `codepoints` are the characters that it draws."""

    path: Path
    package: str
    package_version: str
    license: str
    family: str
    style: str
    version: str
    codepoints: frozenset[int] = field(repr=False)

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def is_regular(self) -> bool:
        """Whether this is the upright face of regular weight and width."""
        return self.style in UPRIGHT_STYLES

    @cached_property
    def data(self) -> bytes:
        return self.path.read_bytes()  # held in memory, since thousands of open files exceed the system's limit

    def at(self, size: int) -> ImageFont.FreeTypeFont | None:
        """Return the font at a size in pixels, or None for bitmap fonts that lack this size."""
        try:
            # The basic layout gives the same image whether or not Pillow has its optional layout library.
            return ImageFont.truetype(io.BytesIO(self.data), size, layout_engine=ImageFont.Layout.BASIC)
        except OSError:
            return None


@dataclass
class FontLibrary:
    """The faces that a glyph set is drawn from."""

    training: list[Face]
    hangul: list[Face]
    held_out: dict[str, list[Face]]

    def all_faces(self) -> list[Face]:
        """Return every face once."""
        return [*self.training, *self.hangul, *(face for faces in self.held_out.values() for face in faces)]


def read_face(path: Path, package: str, package_version: str, license: str) -> Face | None:
    """Return the face of a font file, or None if the file has no Unicode character map."""
    try:
        with TTFont(path, lazy=True) as font:
            cmap = font.getBestCmap()
            names = font["name"]
            family, style = (names.getDebugName(a) or names.getDebugName(b) for a, b in ((16, 1), (17, 2)))
            version = names.getDebugName(5)
    except (TTLibError, KeyError):
        return None
    if not cmap:
        return None
    codepoints = frozenset(code for code, glyph in cmap.items() if glyph != ".notdef")
    return Face(path, package, package_version, license, family or "", style or "", version or "", codepoints)


def installed_library(hangul: bool) -> FontLibrary:
    """Return the faces of the installed Debian packages, with those for Hangul syllables if `hangul`.

    Raises:
        UserError: packages or files are missing.
    """
    hangul_packages = HANGUL_PACKAGES if hangul else {}
    held_out_packages = [package for package, _, _ in HELD_OUT_FONTS.values()]
    versions = _package_versions([*TRAINING_PACKAGES, *hangul_packages, *held_out_packages])

    def faces_of(packages: dict[str, str]) -> list[Face]:
        files = ((path, package) for package in packages for path in _package_fonts(package))
        faces = (read_face(path, package, versions[package], packages[package]) for path, package in files)
        return [face for face in faces if face]

    held_out = {}
    for name, (package, license, files) in HELD_OUT_FONTS.items():
        paths = {path.name: path for path in _package_fonts(package)}
        if missing := [file for file in files if file not in paths]:
            raise UserError(f"Package {package} {versions[package]} has no file {missing[0]}; install another version.")
        faces = (read_face(paths[file], package, versions[package], license) for file in files)
        held_out[name] = [face for face in faces if face]
    return FontLibrary(faces_of(TRAINING_PACKAGES), faces_of(hangul_packages), held_out)


def miniature_library() -> FontLibrary:
    """Return DejaVu faces that Matplotlib ships, with ASCII letters alone."""
    folder = Path(matplotlib.get_data_path()) / "fonts/ttf"

    def faces_of(files: Iterable[str]) -> list[Face]:
        faces = (read_face(folder / file, "matplotlib", matplotlib.__version__, MINIATURE_LICENSE) for file in files)
        return [dataclasses.replace(face, codepoints=face.codepoints & MINIATURE_CHARACTERS) for face in faces if face]

    held_out = {name: faces_of([file]) for name, file in MINIATURE_HELD_OUT.items()}
    return FontLibrary(faces_of(MINIATURE_TRAINING), [], held_out)


def _package_versions(packages: list[str]) -> dict[str, str]:
    """Return the versions of installed packages; raises `UserError` naming all that are missing."""
    versions = {}
    for package in packages:
        status = _dpkg_query("-W", "-f", "${db:Status-Status} ${Version}", package).split()
        if status and status[0] == "installed":
            versions[package] = status[1]
    if missing := [package for package in packages if package not in versions]:
        names = " ".join(dict.fromkeys(missing))
        raise UserError(f"Font packages are not installed: {names}. Run: apt-get install {names}")
    return versions


def _package_fonts(package: str) -> list[Path]:
    """Return the font files of an installed package, by name."""
    paths = map(Path, _dpkg_query("-L", package).splitlines())
    return sorted(path for path in paths if path.suffix in FONT_SUFFIXES and path.is_file())


def _dpkg_query(*arguments: str) -> str:
    try:
        return subprocess.run(["dpkg-query", *arguments], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        raise UserError("dpkg-query is missing: the glyph set is built from Debian's font packages.") from None
