"""The one image decoder: every mode, transparency and orientation that Pillow knows, with the right pixels."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw, PngImagePlugin, features

from modeling_amorlip.images_amorlip import IMAGE_EXTENSIONS, TRANSPOSES, convert_to_rgb, open_image


WHITE = (255, 255, 255)
AVIF = pytest.param("AVIF", marks=pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF"))
EXACT = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}, "AVIF": {"quality": 100, "speed": 10}}


def encode(image, format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def rgb(source):
    """The decoder's pixels, by way of `open_image`; `convert_to_rgb` of Pillow's own image must give the same."""
    opened = convert_to_rgb(open_image(source))
    direct = convert_to_rgb(Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source)
    assert opened.mode == "RGB" and opened.size == direct.size and opened.tobytes() == direct.tobytes()
    assert convert_to_rgb(opened).tobytes() == opened.tobytes()
    return np.asarray(opened)


def png(width, height, depth, color_type, rows: bytes, *chunks) -> bytes:
    """A PNG from raw rows; for what Pillow cannot write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    stride = len(rows) // height
    filtered = b"".join(b"\0" + rows[stride * row : stride * (row + 1)] for row in range(height))
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    middle = b"".join(chunk(*pair) for pair in chunks)
    data = chunk(b"IHDR", header) + middle + chunk(b"IDAT", zlib.compress(filtered)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def palette(colors, alpha=None):
    image = Image.new("P", (len(colors), 1))
    image.putpalette([channel for color in colors for channel in color])
    image.putdata(range(len(colors)))
    return encode(image, **({} if alpha is None else {"transparency": bytes(alpha)}))


def gray(values, dtype, format="TIFF"):
    return encode(Image.fromarray(np.array([values], dtype)), format)


def pixels(mode, *values):
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


# A source, and the pixels of its first row.
SOURCES = {
    "1": (encode(pixels("1", 0, 255)), [(0, 0, 0), WHITE]),
    "L": (encode(pixels("L", 0, 100)), [(0, 0, 0), (100, 100, 100)]),
    "L, transparent color": (encode(pixels("L", 0, 100), transparency=100), [(0, 0, 0), WHITE]),
    "LA": (encode(pixels("LA", (100, 255), (100, 0), (55, 51))), [(100, 100, 100), WHITE, (215, 215, 215)]),
    "La": (pixels("La", (100, 255), (0, 0)), [(100, 100, 100), WHITE]),
    "P": (palette([(255, 0, 0), (0, 9, 0)]), [(255, 0, 0), (0, 9, 0)]),
    "P, transparency": (palette([(255, 0, 0), (0, 9, 0)], [255, 0]), [(255, 0, 0), WHITE]),
    "PA": (Image.open(io.BytesIO(palette([(255, 0, 0)]))).convert("PA"), [(255, 0, 0)]),
    "RGB": (encode(pixels("RGB", (1, 2, 3))), [(1, 2, 3)]),
    "RGB, transparent color": (encode(pixels("RGB", (1, 2, 3), (9, 9, 9)), transparency=(1, 2, 3)), [WHITE, (9, 9, 9)]),
    "RGBA": (encode(pixels("RGBA", (1, 2, 3, 255), (1, 2, 3, 0))), [(1, 2, 3), WHITE]),
    "RGBa": (pixels("RGBa", (1, 2, 3, 255), (0, 0, 0, 0)), [(1, 2, 3), WHITE]),
    "RGBX": (pixels("RGBX", (1, 2, 3, 0)), [(1, 2, 3)]),
    "CMYK": (encode(pixels("CMYK", (0, 255, 255, 0)), "TIFF"), [(255, 0, 0)]),
    "YCbCr": (pixels("YCbCr", (255, 128, 128), (76, 85, 255)), [WHITE, (254, 0, 0)]),
    "HSV": (pixels("HSV", (0, 255, 255)), [(255, 0, 0)]),
    "LAB": (encode(pixels("LAB", (255, 128, 128), (0, 128, 128)), "TIFF"), [WHITE, (0, 0, 0)]),
    "I;16": (gray([0, 25600, 65535], np.uint16), [(0, 0, 0), (100, 100, 100), WHITE]),
    "I;16 PNG": (gray([0, 25600, 65535], np.uint16, "PNG"), [(0, 0, 0), (100, 100, 100), WHITE]),
    "I;16 that holds 8 bits": (gray([0, 100, 255], np.uint16), [(0, 0, 0), (100, 100, 100), WHITE]),
    "I;16B": (
        Image.frombytes("I;16B", (2, 1), np.array([25600, 65535], ">u2").tobytes()),
        [(100, 100, 100), WHITE],
    ),
    "I": (gray([-5, 25600, 65535], np.int32), [(0, 0, 0), (100, 100, 100), WHITE]),
    "I, 32 bits": (gray([0, 2**30, 2**31 - 1], np.int32), [(0, 0, 0), (127, 127, 127), WHITE]),
    "F": (gray([0.0, 100.0, 255.0], np.float32), [(0, 0, 0), (100, 100, 100), WHITE]),
    "F from 0 to 1": (gray([0.0, 0.4, 1.0, np.nan], np.float32), [(0, 0, 0), (102, 102, 102), WHITE, (0, 0, 0)]),
    "16-bit RGB": (png(1, 1, 16, 2, struct.pack(">3H", 256, 25600, 65535)), [(1, 100, 255)]),
    "16-bit RGB, transparent color": (
        png(
            2,
            1,
            16,
            2,
            struct.pack(">6H", 256, 512, 768, 2560, 2560, 2560),
            (b"tRNS", struct.pack(">3H", 256, 512, 768)),
        ),
        [WHITE, (10, 10, 10)],
    ),
    "16-bit gray, transparent color": (
        png(2, 1, 16, 0, struct.pack(">2H", 25600, 51200), (b"tRNS", struct.pack(">H", 25600))),
        [WHITE, (200, 200, 200)],
    ),
    "16-bit RGBA": (png(1, 1, 16, 6, struct.pack(">4H", 256, 512, 768, 0)), [WHITE]),
    "1-bit gray, transparent color": (png(2, 1, 1, 0, b"\x40", (b"tRNS", b"\0\0")), [WHITE, WHITE]),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_mode_gives_the_right_pixels(name):
    source, expected = SOURCES[name]
    np.testing.assert_allclose(rgb(source)[0], expected, rtol=0, atol=1 if name == "LAB" else 0)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", AVIF])
def test_animations_give_their_first_frame(format):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue", "lime")]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **EXACT.get(format, {}))
    np.testing.assert_allclose(rgb(data)[8, 8], (255, 0, 0), atol=3)


def test_mpo_gives_its_first_picture():
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    data = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(rgb(data)[8, 8], (255, 0, 0), atol=3)


def test_gif_with_transparency_is_laid_on_white():
    image = Image.new("RGBA", (4, 1), (0, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    np.testing.assert_array_equal(rgb(encode(image, "GIF"))[0], [(255, 0, 0), WHITE, WHITE, WHITE])


# -- orientation -------------------------------------------------------------------------------------------------------


def quarters(mode="RGB"):
    """A 48 x 32 image whose four quarters differ, so that no two orientations look the same."""
    image = Image.new("RGB", (48, 32), "black")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 23, 15), fill="red")
    draw.rectangle((24, 0, 47, 15), fill="lime")
    draw.rectangle((0, 16, 23, 31), fill="blue")
    return image.convert(mode)


INVERSES = {5: 5, 6: 8, 7: 7, 8: 6}  # others undo themselves


def rotated(orientation, mode="RGB"):
    """`quarters` as a camera would store it with this orientation."""
    image = quarters(mode)
    inverse = INVERSES.get(orientation, orientation)
    return image if orientation == 1 else image.transpose(TRANSPOSES[inverse])


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", AVIF])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(format, orientation):
    data = encode(rotated(orientation), format, exif=exif_of(orientation), **EXACT.get(format, {}))
    found = rgb(data)
    assert found.shape == (32, 48, 3)
    expected = np.asarray(quarters())
    np.testing.assert_allclose(found[4::8, 4::8], expected[4::8, 4::8], atol=6)
    assert open_image(open_image(data)).size == (48, 32)


@pytest.mark.parametrize("mode", ["I;16", "L", "P", "RGBA"])
def test_orientation_is_applied_in_every_mode(mode):
    image = quarters("L").point(lambda value: value * 256, "I").convert("I;16") if mode == "I;16" else quarters(mode)
    turned = image.transpose(TRANSPOSES[8])
    found = rgb(encode(turned, exif=exif_of(6)))
    np.testing.assert_array_equal(found, rgb(encode(image)))


def rational_orientation() -> bytes:
    """EXIF whose orientation 6 is a rational number, 6/1, as some tools write it."""
    header = b"II*\0" + struct.pack("<I", 8)
    entry = struct.pack("<HHHII", 1, 0x0112, 5, 1, 26) + struct.pack("<I", 0)
    return b"Exif\0\0" + header + entry + struct.pack("<II", 6, 1)


def raw_profile(content: str):
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", content, zip=True)
    return info


DAMAGED_EXIF = {
    "jpeg, not TIFF": lambda image: encode(image, "JPEG", quality=100, exif=b"Exif\0\0nonsense that is no TIFF"),
    "jpeg, cut": lambda image: encode(image, "JPEG", quality=100, exif=rational_orientation()[:20]),
    "webp": lambda image: encode(image, "WEBP", lossless=True, exif=b"nonsense"),
    "png": lambda image: encode(image, exif=b"nonsense"),
    "png, raw profile": lambda image: encode(image, pnginfo=raw_profile("\nexif\n      9\nzz-not-hexadecimal\n")),
    "png, empty profile": lambda image: encode(image, pnginfo=raw_profile("")),
    "orientation 9": lambda image: encode(image, exif=exif_of(9)),
    "orientation 0": lambda image: encode(image, exif=exif_of(0)),
}


@pytest.mark.parametrize("kind", DAMAGED_EXIF)
def test_damaged_exif_costs_no_image(kind):
    found = rgb(DAMAGED_EXIF[kind](quarters()))
    np.testing.assert_allclose(found[4::8, 4::8], np.asarray(quarters())[4::8, 4::8], atol=6)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_rational_orientation_is_understood(format):
    found = rgb(encode(rotated(6), format, exif=rational_orientation(), **EXACT.get(format, {})))
    np.testing.assert_allclose(found[4::8, 4::8], np.asarray(quarters())[4::8, 4::8], atol=6)


# -- opening -----------------------------------------------------------------------------------------------------------


def test_open_image_takes_bytes_paths_and_images(tmp_path):
    data = encode(quarters())
    (tmp_path / "image.png").write_bytes(data)
    for source in (data, tmp_path / "image.png", str(tmp_path / "image.png"), Image.open(io.BytesIO(data))):
        assert open_image(source).tobytes() == quarters().tobytes()


def test_jpegs_are_not_decoded_on_opening():
    image = open_image(encode(Image.new("RGB", (640, 480)), "JPEG"))
    assert image.draft("RGB", (80, 60)) and image.size == (80, 60)


def test_too_many_pixels_are_refused_before_decoding(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    with pytest.raises(ValueError, match="48 x 32 pixels are more than max_image_pixels 1000"):
        open_image(encode(quarters()), 1000)
    assert open_image(encode(quarters()), 48 * 32).size == (48, 32)


def test_data_that_is_no_image_raises():
    with pytest.raises(Image.UnidentifiedImageError):
        open_image(b"no image")


def test_extensions_are_what_the_decoder_reads():
    expected = {
        ".jpg",
        ".jpeg",
        ".jfif",
        ".jpe",
        ".jp2",
        ".png",
        ".apng",
        ".ppm",
        ".pgm",
        ".pbm",
        ".tga",
        ".bmp",
        ".gif",
    }
    assert expected | {".tif", ".tiff", ".webp"} <= IMAGE_EXTENSIONS
    assert ".avif" in IMAGE_EXTENSIONS or not features.check("avif")
    assert not {".pdf", ".eps", ".ps", ".svg", ".mpg", ".mpeg", ".wmf", ".emf", ".h5", ".grib"} & IMAGE_EXTENSIONS
    assert all(name == name.lower() and name.startswith(".") for name in IMAGE_EXTENSIONS)
