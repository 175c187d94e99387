"""Images of every kind are decoded right, and augmented as a function of the seed alone."""

import io
import random

import numpy as np
import torch
from PIL import Image

from modeling_amorlip.images_amorlip import open_image
from training.config import AugmentationConfig, parse_config
from training.data.transforms import augment


def test_augmentation_is_a_function_of_its_seed(demo_rows):
    image = demo_rows[10]["image"].convert("RGB")
    settings = AugmentationConfig(
        crop_scale=[0.5, 1], horizontal_flip=0.5, rotation=20, zoom=[0.8, 1.2], color_jitter=0.4
    )
    first, again, other = (augment(image, 40, settings, random.Random(seed)) for seed in (1, 1, 2))
    assert first.size == (40, 40) and first.tobytes() == again.tobytes() != other.tobytes()
    unchanged = AugmentationConfig(crop_scale=[1, 1], crop_ratio=[1, 1])
    assert augment(image, 48, unchanged, random.Random(0)).tobytes() == image.tobytes()


def test_images_of_every_kind_are_decoded_right():
    gradient = Image.linear_gradient("L").resize((64, 64))
    colours = Image.merge("RGB", [gradient, gradient.rotate(90), gradient.rotate(180)])
    plain = parse_config(["--output_dir", "x", "--train_data", "x"])
    plain.augmentation = AugmentationConfig(crop_scale=[1, 1], crop_ratio=[1, 1])

    def decoded(image, form="PNG", **options):
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        opened = open_image(buffer.getvalue(), 10**6)
        result = augment(opened, 64, plain.augmentation, random.Random(0))
        assert (result.mode, result.size) == ("RGB", (64, 64))
        return torch.tensor(np.asarray(result), dtype=torch.float)

    def distance(a, b):
        return (a - b).abs().mean().item()

    expected, grey = decoded(colours), decoded(gradient.convert("RGB"))
    assert distance(decoded(gradient), grey) == 0
    deep = Image.fromarray(np.asarray(gradient).astype("uint16") * 257)
    assert distance(decoded(deep), grey) < 1  # 16 bits
    assert distance(decoded(colours.quantize(256)), expected) < 6
    assert distance(decoded(colours.convert("CMYK"), "JPEG", quality=95), expected) < 4
    assert distance(decoded(colours, "JPEG", quality=95), expected) < 4
    assert distance(decoded(colours, "WEBP", lossless=True), expected) == 0
    transparent = colours.copy()
    transparent.putalpha(0)
    assert decoded(transparent).min() == 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    turned = decoded(colours.rotate(90), "JPEG", quality=95, exif=exif)
    assert distance(turned, expected) < 4 < distance(turned, decoded(colours.rotate(90)))


def test_large_jpeg_is_reduced_while_it_is_decoded():
    image = Image.effect_mandelbrot((1024, 1024), (-2, -1.5, 1, 1.5), 100).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    plain = parse_config(["--output_dir", "x", "--train_data", "x"]).augmentation
    opened = open_image(buffer.getvalue(), 10**7)
    ours = augment(opened, 128, plain, random.Random(1))
    assert opened.size == (256, 256)  # a crop of at least 0.9 needs no more
    whole = augment(image, 128, plain, random.Random(1))
    ours, whole = (torch.tensor(np.asarray(image)).float() for image in (ours, whole))
    assert (ours - whole).abs().mean() < 5
