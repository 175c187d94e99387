"""Build the demo's data: emoji in three drawing styles for training, and in a fourth for testing.

    python demo_data/emoji/build_emoji.py

The script needs `npm` to download the packages below and `resvg-py` to draw SVG. The same packages give the same files.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import datasets
import resvg_py
from PIL import Image


STYLES = {  # style: (package, license of the drawings)
    "noto": ("@iconify-json/noto@1.2.9", "Apache-2.0"),
    "twemoji": ("@iconify-json/twemoji@1.2.5", "CC-BY-4.0"),
    "fluent-emoji-flat": ("@iconify-json/fluent-emoji-flat@1.2.6", "MIT"),
}
HELD_OUT = "@iconify-json/openmoji@1.2.29"
NAMES, LABELS, KEYWORDS = "unicode-emoji-json@0.9.0", "emojibase-data@17.0.0", "emojilib@4.0.3"
SIZE = 48
FOLDER = Path(__file__).resolve().parent


def fetch(package: str, folder: Path) -> Path:
    """Download an npm package and return the folder of its files."""
    packed = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()
    target = folder / Path(packed).stem
    with tarfile.open(folder / packed) as archive:
        archive.extractall(target, filter="data")
    return target / "package"


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def concept_of(emoji: str) -> str:
    """Return the code points in hexadecimal, without variation selectors."""
    return "-".join(f"{ord(character):x}" for character in emoji if character != "\ufe0f")


def draw(icons: dict[str, Any], name: str, crop: bool) -> bytes:
    """Return an icon as a palette PNG of SIZE x SIZE pixels on white; `crop` crops to the drawing and centers it."""
    icon = icons["icons"][icons.get("aliases", {}).get(name, {}).get("parent", name)]
    box = {
        key: icon.get(key, icons.get(key, default)) for key, default in dict(left=0, top=0, width=16, height=16).items()
    }
    view_box = f"{box['left']} {box['top']} {box['width']} {box['height']}"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view_box}" width="192" height="192">{icon["body"]}</svg>'
    drawing = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, dpi=96)))).convert("RGBA")
    if crop:
        drawing = drawing.crop(drawing.getchannel("A").getbbox())
    side = max(drawing.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
    image = canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def describe(folder: Path) -> dict[str, dict[str, Any]]:
    """Return caption, captions, tags and category by concept; skin tones have no entry of their own."""
    names = read_json(fetch(NAMES, folder) / "data-by-emoji.json")
    keywords = read_json(fetch(KEYWORDS, folder) / "dist/emoji-en-US.json")
    labels = {concept_of(entry["emoji"]): entry for entry in read_json(fetch(LABELS, folder) / "en/data.json")}
    concepts = {}
    for emoji, entry in names.items():
        concept = concept_of(emoji)
        label = labels.get(concept, {})
        words = [word.replace("_", " ").lower() for word in (*label.get("tags", ()), *keywords.get(emoji, ()))]
        concepts[concept] = {
            "caption": entry["name"].lower(),
            "captions": list(dict.fromkeys([entry["name"].lower(), label.get("label", entry["name"]).lower()])),
            "tags": [word for word in dict.fromkeys(words) if any(map(str.isalpha, word))][:12],
            "category": entry["group"],
        }
    return concepts


def icons_of(package: str, folder: Path, concepts: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the icons of a package, and the icon names of the concepts that it draws, by concept."""
    files = fetch(package, folder)
    characters = read_json(files / "chars.json")
    # Icon sets differ in whether they write the variation selector, so names are compared without it.
    names = {"-".join(c for c in code.split("-") if c != "fe0f"): name for code, name in characters.items()}
    return read_json(files / "icons.json"), {concept: names[concept] for concept in concepts if concept in names}


def build_train(folder: Path, concepts: dict[str, dict[str, Any]]) -> None:
    """Write the training set."""
    rows = []
    for style, (package, license) in STYLES.items():
        icons, names = icons_of(package, folder, concepts)
        for concept, name in names.items():
            image = {"bytes": draw(icons, name, crop=True), "path": None}
            rows.append({"image": image, **concepts[concept], "style": style, "concept": concept, "license": license})
    rows.sort(key=lambda row: (row["concept"], row["style"]))
    save(rows, datasets.Features(TRAIN_FEATURES), "train.parquet")


def build_held_out(folder: Path, concepts: dict[str, dict[str, Any]]) -> None:
    """Write the test set with its class names and templates."""
    icons, names = icons_of(HELD_OUT, folder, concepts)
    held_out = {concepts[c]["caption"]: name for c, name in names.items() if concepts[c]["category"] != "Flags"}
    classes = sorted(held_out)
    # Test images stay on their page as published, since images that a model meets later are not cropped either.
    rows = [
        {"image": {"bytes": draw(icons, held_out[c], crop=False), "path": None}, "label": i}
        for i, c in enumerate(classes)
    ]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}
    save(rows, datasets.Features(features), "openmoji.parquet")
    text = {"classes": classes, "templates": ["{}", "an emoji of {}"]}
    (FOLDER / "openmoji.json").write_text(json.dumps(text, ensure_ascii=False, indent=0), encoding="utf-8")


def build() -> None:
    """Write both sets beside this script."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        concepts = describe(folder)
        build_train(folder, concepts)
        build_held_out(folder, concepts)


TRAIN_FEATURES = {
    "image": datasets.Image(),
    "caption": datasets.Value("string"),
    "captions": datasets.List(datasets.Value("string")),
    "tags": datasets.List(datasets.Value("string")),
    "category": datasets.Value("string"),
    "style": datasets.Value("string"),
    "concept": datasets.Value("string"),
    "license": datasets.Value("string"),
}


def save(rows: list[dict[str, Any]], features: datasets.Features, name: str) -> None:
    """Write a parquet file beside this script and print its size."""
    datasets.Dataset.from_list(rows, features=features).to_parquet(FOLDER / name)
    print(f"{name}: {len(rows)} rows, {(FOLDER / name).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    build()
