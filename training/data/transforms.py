"""From a file's bytes to training pixels: guarded opening, one resampling from crop to size, augmentation."""

from __future__ import annotations

import math
import random

from PIL import Image, ImageChops, ImageFilter, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from training.config import AugmentationConfig


def augment(image: Image.Image, size: int, settings: AugmentationConfig, generator: random.Random) -> Image.Image:
    """Crop, resize (one bicubic resampling), move, mirror and recolour; returns an RGB image of size x size pixels."""
    image = _crop(image, size, _crop_box(image.size, settings, generator)).convert("RGB")
    zoom = math.exp(generator.uniform(*map(math.log, settings.zoom)))
    angle = math.radians(generator.uniform(-settings.rotation, settings.rotation))
    shift = [size * generator.uniform(-settings.translation, settings.translation) for _ in range(2)]
    if (zoom, angle, *shift) != (1, 0, 0, 0):
        # Output pixel (x, y) is read at centre + R (x, y - centre - shift) / zoom.
        cos, sin, centre = math.cos(angle) / zoom, math.sin(angle) / zoom, size / 2
        x, y = centre + shift[0], centre + shift[1]
        matrix = (cos, -sin, centre - cos * x + sin * y, sin, cos, centre - sin * x - cos * y)
        border = image.getpixel((0, 0))
        image = image.transform(
            (size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=border
        )
    if generator.random() < settings.horizontal_flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if settings.color_jitter:
        image = image.convert("RGB", _color_matrix(settings.color_jitter, generator))
    if generator.random() < settings.restyle:
        image = generator.choice(RESTYLES)(image)
    return image


RESTYLES = (
    ImageOps.autocontrast,
    ImageOps.equalize,
    ImageOps.invert,
    lambda image: ImageOps.posterize(image, 2),
    lambda image: ImageOps.grayscale(image).convert("RGB"),
    lambda image: image.filter(ImageFilter.BLUR),
    lambda image: image.filter(ImageFilter.EDGE_ENHANCE_MORE),
    lambda image: ImageChops.multiply(image, image.filter(ImageFilter.CONTOUR)),
)
"""Other ways to draw the same thing: tones, colours, sharpness and outlines."""


def _crop(image: Image.Image, size: int, box: tuple[float, float, float, float]) -> Image.Image:
    """The box as size x size pixels, with its file's own colours."""
    if isinstance(image, JpegImageFile):
        # Decode at the smallest eighth that still has a pixel for each that is wanted.
        full, (left, top, right, bottom) = image.size, box
        image.draft(None, (math.ceil(full[0] * size / (right - left)), math.ceil(full[1] * size / (bottom - top))))
        box = tuple(edge * image.size[i % 2] / full[i % 2] for i, edge in enumerate(box))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3)


def _crop_box(image_size, settings: AugmentationConfig, generator: random.Random) -> tuple[float, float, float, float]:
    """A box of random area and shape inside the image (Inception's RandomResizedCrop)."""
    width, height = image_size
    area = width * height * generator.uniform(*settings.crop_scale)
    ratio = math.exp(generator.uniform(*map(math.log, settings.crop_ratio)))
    w, h = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    left, top = generator.uniform(0, width - w), generator.uniform(0, height - h)
    return left, top, min(left + w, width), min(top + h, height)


def _color_matrix(strength: float, generator: random.Random) -> tuple[float, ...]:
    """Brightness, contrast about mid-grey and saturation as one 3 x 4 matrix on RGB."""
    brightness, contrast, saturation = (generator.uniform(1 - strength, 1 + strength) for _ in range(3))
    luma, gain = (0.299, 0.587, 0.114), brightness * contrast
    offset = 128 * (1 - contrast)
    matrix = []
    for row in range(3):
        matrix += [gain * ((1 - saturation) * luma[column] + saturation * (row == column)) for column in range(3)]
        matrix.append(offset)
    return tuple(matrix)
