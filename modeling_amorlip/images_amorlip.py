"""The image decoder and resizer of training, evaluation and inference: whatever Pillow reads becomes upright RGB.

`open_image` leaves a JPEG undecoded until it is cropped or resized, so that only the needed part is decoded;
`convert_to_rgb` finishes any image, opened here or elsewhere. Both apply the same rules: the camera's orientation is
applied, transparency is laid on white, integers and floats of more than 8 bits are scaled to 8 and the first frame of
an animation is used.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFile
from torch import Tensor


EXIF_ORIENTATION = 0x0112
# What brings each orientation upright (EXIF 2.3, Section 4.6.4 A).
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where Pillow keeps orientations; they must not outlive the rotation, or the next reader would rotate again.
ORIENTATION_SOURCES = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
NOT_RASTER = {"EPS", "IPTC", "MPEG"}  # formats that Pillow identifies, but that are no images of pixels
COMMON_FORMATS = ("JPEG", "PNG", "WEBP")  # tried first


def _raster_extensions() -> frozenset[str]:
    Image.init()
    formats = set()
    for name, (factory, _) in Image.OPEN.items():
        is_stub = isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
        if not is_stub and name not in NOT_RASTER:
            formats.add(name)
    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in formats)


# Lower case, with the dot. Plugins count when they are registered before this module is imported.
IMAGE_EXTENSIONS = _raster_extensions()


@functools.cache
def _image_formats(num_known: int) -> list[str]:
    """Return the formats that are opened: not PostScript, which Pillow hands to Ghostscript whatever a file's name.

    Args:
        num_known: how many formats Pillow knows; plugins add to them.
    """
    others = [name for name in Image.ID if name not in NOT_RASTER and name not in COMMON_FORMATS]
    return [name for name in COMMON_FORMATS if name in Image.OPEN] + others


def open_image(source: bytes | str | Path | Image.Image, max_pixels: int | None = None) -> Image.Image:
    """Open an image upright, ready to crop and resize; a JPEG is not decoded yet unless it has to be rotated.

    Args:
        source: an image file's content or path, or an image that is open already.
        max_pixels: refuse larger images before anything is decoded; None leaves Pillow's own limit.

    Returns:
        An image of mode RGB, L or CMYK, without transparency and without an orientation left to apply.

    Raises:
        ValueError: the header says more than `max_pixels`.
        Exception: whatever Pillow raises for data that is not an image.
    """
    if max_pixels is not None:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow itself raises for twice as many while it opens
    if isinstance(source, Image.Image):
        image = source
    else:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        image = Image.open(file, formats=_image_formats(len(Image.ID)))
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise ValueError(f"{image.width} x {image.height} pixels are more than max_image_pixels {max_pixels}")
    image = _upright(image)
    is_ready = image.mode in ("RGB", "L", "CMYK") and "transparency" not in image.info
    return image if is_ready else convert_to_rgb(image)


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Return the image upright in RGB, with transparency laid on white."""
    image = _upright(image)
    if image.mode.startswith(("I", "F")):
        return _convert_deep_gray(image).convert("RGB")
    if image.mode == "LAB":
        return _convert_lab(image)
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = _with_alpha(image)
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def preprocess_images(image_processor, images: list[Image.Image]) -> Tensor:
    """Return what an image processor makes of images, float32 [N, 3, H, W], in a fraction of its time."""
    images = [convert_to_rgb(image) for image in images]
    if not (image_processor.do_rescale and image_processor.do_normalize):
        return image_processor(images, return_tensors="pt")["pixel_values"]
    # The processor would rescale image by image, and resize to the size that they have already: five times the work.
    if len({image.size for image in images}) == 1 and _has_final_size(images[0], image_processor):
        pixels = torch.from_numpy(_stack(images)).permute(0, 3, 1, 2)
    else:
        pixels = image_processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (image_processor.image_mean, image_processor.image_std))
    return torch.addcmul(-mean / std, pixels.float(), image_processor.rescale_factor / std)


def _stack(images: list[Image.Image]) -> np.ndarray:
    """Return the pixels of RGB images of one size, uint8 [N, H, W, 3], exported once instead of image by image."""
    width, height = images[0].size
    column = Image.new("RGB", (width, height * len(images)))
    for number, image in enumerate(images):
        column.paste(image, (0, number * height))
    return np.array(column).reshape(len(images), height, width, 3)


def _has_final_size(image: Image.Image, image_processor) -> bool:
    """Return whether an image processor would leave an RGB image's pixels as they are."""
    resized = dict(image_processor.size) if image_processor.do_resize else {}
    cropped = dict(image_processor.crop_size) if getattr(image_processor, "do_center_crop", False) else {}
    actual = {"shortest_edge": min(image.size), "height": image.height, "width": image.width}
    return all(actual.get(name) == value for name, value in [*resized.items(), *cropped.items()])


def _upright(image: Image.Image) -> Image.Image:
    """Return the image with its orientation applied, or the same image, not decoded, where there is none to apply."""
    if _orientation(image) == 1:
        return image
    image.load()  # which makes a TIFF upright and forgets its orientation
    if (orientation := _orientation(image)) == 1:
        return image
    image = image.transpose(TRANSPOSES[orientation])
    for name in ORIENTATION_SOURCES:
        image.info.pop(name, None)
    return image


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1, upright, where there is none or it cannot be read."""
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
        value = value[0] if isinstance(value, tuple) else value
        return int(value) if value in TRANSPOSES else 1
    except Exception:  # Pillow raises all kinds of errors for damaged EXIF, which the pixels do not depend on
        return 1


def _convert_deep_gray(image: Image.Image) -> Image.Image:
    """Return an image of one integer or floating-point channel in 8 bits, mode L."""
    values = np.nan_to_num(np.asarray(image, np.float64))
    largest = values.max()
    if image.mode == "F" and largest <= 1:
        divisor = 1 / 255
    elif largest <= 255:
        divisor = 1.0
    else:
        divisor = 256.0 if largest < 2**16 else largest / 255
    gray = np.clip(values / divisor, 0, 255)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray[values == transparent] = 255
    return Image.fromarray(gray.astype(np.uint8))


def _convert_lab(image: Image.Image) -> Image.Image:
    lab, srgb = (ImageCms.ImageCmsProfile(ImageCms.createProfile(name)) for name in ("LAB", "sRGB"))
    return ImageCms.ImageCmsTransform(lab, srgb, "LAB", "RGB").apply(image)


def _with_alpha(image: Image.Image) -> Image.Image:
    """Return an image that has an alpha channel, or a transparent color, in RGBA."""
    transparent = image.info.get("transparency")
    if isinstance(transparent, tuple) and max(transparent) > 255:  # 16 bits, while Pillow keeps 8 of the pixels
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    try:
        return image.convert("RGBA")
    except (ValueError, TypeError):  # a transparent color that the mode does not have
        return image.convert("RGB").convert("RGBA")
