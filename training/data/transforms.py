"""Crop, resize and augment training images."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from PIL import Image, ImageChops, ImageFilter, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from training.config import AugmentationConfig


CROP_ATTEMPTS = 10
ROUNDING = 1e-6  # pixels by which a crop of the whole image may seem too large

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge in pixels."""


def augment(image: Image.Image, size: int, config: AugmentationConfig, generator: random.Random) -> Image.Image:
    """Crop, resize, move, flip and recolor an image; return an RGB image of size x size pixels.

    The crop is resized by a single bicubic resampling.

    Args:
        image: an image that is not decoded yet, or any RGB, L or CMYK image.
        size: height and width of the result.
        config: ranges and probabilities of the augmentations.
        generator: source of all random numbers.
    """
    image = _resize_crop(image, size, _draw_crop(image.size, config, generator)).convert("RGB")
    image = _move(image, config, generator)
    if generator.random() < config.horizontal_flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if config.color_jitter:
        image = image.convert("RGB", _draw_color_matrix(config.color_jitter, generator))
    if generator.random() < config.restyle:
        image = generator.choice(RESTYLES)(image)
    return image


RESTYLES: tuple[Callable[[Image.Image], Image.Image], ...] = (
    ImageOps.autocontrast,
    ImageOps.equalize,
    ImageOps.invert,
    lambda image: ImageOps.posterize(image, 2),
    lambda image: ImageOps.grayscale(image).convert("RGB"),
    lambda image: image.filter(ImageFilter.BLUR),
    lambda image: image.filter(ImageFilter.EDGE_ENHANCE_MORE),
    lambda image: ImageChops.multiply(image, image.filter(ImageFilter.CONTOUR)),
)
"""Changes of tone, color, sharpness and outline that keep the subject."""


def _draw_crop(image_size: tuple[int, int], config: AugmentationConfig, generator: random.Random) -> Box:
    """Draw a box of random area, aspect ratio and position inside the image, as torchvision's RandomResizedCrop does.

    A box that does not fit is drawn again. After ten attempts the box is the largest one in the center of the image
    whose ratio is allowed: the whole image, or what is left of its longer side.
    """
    width, height = image_size
    for _ in range(CROP_ATTEMPTS):
        area = width * height * generator.uniform(*config.crop_scale)
        ratio = math.exp(generator.uniform(*map(math.log, config.crop_ratio)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w < width + ROUNDING and h < height + ROUNDING:
            w, h = min(w, width), min(h, height)
            left, top = generator.uniform(0, width - w), generator.uniform(0, height - h)
            return left, top, min(left + w, width), min(top + h, height)
    lowest, highest = config.crop_ratio
    w, h = min(width, height * highest), min(height, width / lowest)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def _resize_crop(image: Image.Image, size: int, box: Box) -> Image.Image:
    """Return the box as size x size pixels, in the color mode of the image."""
    if isinstance(image, JpegImageFile):
        # libjpeg decodes at 1/2, 1/4 or 1/8 for free: use the smallest that has a pixel for each output pixel.
        (width, height), (left, top, right, bottom) = image.size, box
        image.draft(None, (math.ceil(width * size / (right - left)), math.ceil(height * size / (bottom - top))))
        box = (
            left * image.width / width,
            top * image.height / height,
            right * image.width / width,
            bottom * image.height / height,
        )
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3)


def _move(image: Image.Image, config: AugmentationConfig, generator: random.Random) -> Image.Image:
    """Zoom, rotate and shift a square image at random; its upper left pixel fills what becomes visible."""
    size = image.width
    zoom = math.exp(generator.uniform(*map(math.log, config.zoom)))
    angle = math.radians(generator.uniform(-config.rotation, config.rotation))
    shift = [size * generator.uniform(-config.translation, config.translation) for _ in range(2)]
    if (zoom, angle, *shift) == (1, 0, 0, 0):
        return image
    # Output pixel (x, y) shows the input at center + R (x, y - center - shift) / zoom.
    cos, sin, center = math.cos(angle) / zoom, math.sin(angle) / zoom, size / 2
    x, y = center + shift[0], center + shift[1]
    matrix = (cos, -sin, center - cos * x + sin * y, sin, cos, center - sin * x - cos * y)
    border = image.getpixel((0, 0))
    return image.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=border)


def _draw_color_matrix(strength: float, generator: random.Random) -> tuple[float, ...]:
    """Draw changes of brightness, contrast (about middle gray) and saturation as one 3 x 4 matrix on RGB."""
    brightness, contrast, saturation = (generator.uniform(1 - strength, 1 + strength) for _ in range(3))
    luma, gain = (0.299, 0.587, 0.114), brightness * contrast
    offset = 128 * (1 - contrast)
    matrix = []
    for row in range(3):
        matrix += [gain * ((1 - saturation) * luma[column] + saturation * (row == column)) for column in range(3)]
        matrix.append(offset)
    return tuple(matrix)
