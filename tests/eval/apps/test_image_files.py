"""eval/apps/image_files.py: which files are found, what is left out and said of it, and how images are read."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from eval.apps.image_files import encode_files, find_images, list_images, read_image, scan_folder
from modeling_amorlip.cli_amorlip import UserError


FORMATS = ["avif", "jfif", "jpe", "jpeg", "JPG", "jp2", "j2k", "ppm", "tga", "gif", "bmp", "webp", "tiff", "pcx", "qoi"]


@pytest.fixture
def picture():
    """A smooth color image, which every format keeps nearly as it is."""
    ramp = np.linspace(0, 255, 64)
    return Image.fromarray(np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 128), -1).astype(np.uint8))


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_is_found_and_decoded(picture, tmp_path, suffix):
    path = save(picture, tmp_path / f"a.{suffix}")
    assert find_images(tmp_path) == [path]
    pixels = np.asarray(read_image(path), np.float64)
    assert np.abs(pixels - np.asarray(picture)).mean() < (12 if suffix == "gif" else 4)


def test_read_image_scales_16_bit_gray(picture, tmp_path):
    gray = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    pixels = np.asarray(read_image(save(Image.fromarray(gray), tmp_path / "a.png")))
    np.testing.assert_array_equal(pixels, np.asarray(picture.convert("L").convert("RGB")))


def test_read_image_applies_exif_orientation(picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    picture.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").tobytes() == picture.tobytes()


def test_scan_names_what_it_leaves_out(picture, tmp_path):
    image = save(picture, tmp_path / "sub/a.png")
    for name in ("b.heic", "c.HEIC", "notes.txt", "README", "._a.png"):
        (tmp_path / name).write_bytes(b"no image")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    for folder in (".git", "@eaDir", "old/thumbs", "old/full"):
        save(picture, tmp_path / folder / "x.png")
    scan = scan_folder(tmp_path, ["old/th*"])
    assert scan.images == [tmp_path / "old/full/x.png", image]
    assert scan.skipped == {
        ".heic": 2,
        ".txt": 1,
        "without suffix": 1,
        "._* (macOS metadata)": 1,
        "broken links or special files": 2,
    }
    assert {path.name for path in scan.excluded} == {".git", "@eaDir", "thumbs"}
    assert "7 files" in scan.summary() and "2 .heic" in scan.summary() and "old/thumbs" in scan.summary()


def test_find_images_reports_omissions(picture, tmp_path, capsys):
    save(picture, tmp_path / "a.png")
    find_images(tmp_path)
    assert capsys.readouterr().err == ""
    (tmp_path / "b.heic").write_bytes(b"no image")
    find_images(tmp_path)
    assert "skipped 1 file that the decoder does not read (1 .heic)" in capsys.readouterr().err


@pytest.mark.parametrize("pattern", ["old", "o*d", "sub/old", "sub/old/", "{root}/sub/old"])
def test_exclude_patterns(picture, tmp_path, pattern):
    save(picture, tmp_path / "sub/old/x.png")
    image = save(picture, tmp_path / "sub/older/x.png" if pattern != "o*d" else tmp_path / "sub/new/x.png")
    assert find_images(tmp_path, [pattern.format(root=tmp_path)]) == [image]


def test_linked_folders_are_followed_once(picture, tmp_path):
    inside, outside = save(picture, tmp_path / "in/z/a.png"), save(picture, tmp_path / "out/b.png")
    (tmp_path / "in/z/up").symlink_to("..")  # a loop
    (tmp_path / "in/alias").symlink_to("z")  # sorts before the real folder
    (tmp_path / "in/link").symlink_to(outside.parent)
    (tmp_path / "in/same").symlink_to(outside.parent)
    assert find_images(tmp_path / "in") == [tmp_path / "in/link/b.png", inside]


def test_unreadable_folder_is_named(picture, tmp_path, monkeypatch):
    image, _ = save(picture, tmp_path / "a/x.png"), save(picture, tmp_path / "b/x.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    scan = scan_folder(tmp_path)
    assert scan.images == [image] and scan.unreadable == [tmp_path / "b"]
    assert "could not read 1 folder (" in scan.summary()


def test_list_images_takes_files_folders_globs_and_urls(picture, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    a, b, c = (save(picture, tmp_path / name) for name in ("x/a.png", "x/y/b.jpg", "[c].png"))
    url = "https://example.org/d.png"
    assert list_images([str(c), url, str(tmp_path / "x"), str(b)]) == [c, url, a, b]
    assert list_images([str(tmp_path / "x/**/*.jpg")]) == [b]
    assert list_images(["~/x/a.png"]) == list_images(["~/x/*.png"]) == [a]
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in (
        ("", "is empty"),
        (str(tmp_path / "*.gif"), "the pattern matches no file"),
        (str(tmp_path / "no.png"), "there is no such file or folder"),
        (str(tmp_path / "pipe.png"), "is not a regular file"),
    ):
        with pytest.raises(UserError, match=message):
            list_images([name])


def test_encode_files_skips_and_names_broken_images(picture, tiny_model, tmp_path, capsys):
    model, processor = AutoModel.from_pretrained(tiny_model).eval(), AutoProcessor.from_pretrained(tiny_model)
    good = [save(picture, tmp_path / name) for name in ("a.png", "b.png")]
    cut = tmp_path / "cut.jpg"
    picture.save(cut)
    cut.write_bytes(cut.read_bytes()[:300])
    (tmp_path / "page.jpg").write_text("<html>")
    embeds = encode_files(model, processor, [cut, good[0], tmp_path / "page.jpg", good[1]], batch_size=1)
    assert list(embeds) == good
    torch.testing.assert_close(embeds[good[0]], embeds[good[1]])
    errors = capsys.readouterr().err
    assert f"skipped {cut}: " in errors and f"skipped {tmp_path / 'page.jpg'}: it is not an image" in errors
    assert encode_files(model, processor, [cut]) == {}
